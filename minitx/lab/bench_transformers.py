"""The counterpart in ``minitx bench``: Hugging Face transformers with the same weights.

The model is written to a temporary folder and loaded from there, so both read one set of numbers.
Needs torch and transformers (the ``reference`` extra); nothing else in minitx's measuring does.
"""

from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers

from minitx.checkpoints.huggingface import write_model
from minitx.model import Transformer


class Transformers:
    """A model in transformers: float32, one thread, inference mode, KV cache, default attention."""

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}

    def __init__(self, model: Transformer):
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        with TemporaryDirectory() as folder:
            write_model(model, folder, "F32")
            load = transformers.AutoModelForCausalLM.from_pretrained
            self.model = load(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None  # never stop early

    def ways_to_decode(self) -> dict:
        """Two ways of decoding, either of which may be faster: name -> f(first id, count) ->
        ids."""
        return {"own loop": self.loop, "generate": self.generate}

    @torch.inference_mode()
    def loop(self, first: int, count: int) -> list[int]:
        """The plain loop: run the model, take the argmax, repeat."""
        ids, cache, new = torch.tensor([[first]]), None, []
        for _ in range(count):
            out = self.model(ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            new.append(int(ids))
        return new

    @torch.inference_mode()
    def generate(self, first: int, count: int) -> list[int]:
        """The ``generate`` of transformers."""
        ids = torch.tensor([[first]])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return out[0, 1:].tolist()

    @torch.inference_mode()
    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Logits (V,) after the ids (T,), in one call that also fills the KV cache."""
        out = self.model(torch.from_numpy(ids)[None], use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].numpy()

    @torch.inference_mode()
    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits (T, V) at every position."""
        return self.model(torch.from_numpy(ids)[None]).logits[0].numpy()
