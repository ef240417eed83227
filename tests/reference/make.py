"""Generate NAME.npz in this folder: outputs of Hugging Face transformers for the models of minitx.

    python tests/reference/make.py [NAME...]      (requires torch and transformers; default: all)

The models are those in ``weights/``, which transformers reads directly, and the random models
below, which minitx writes to a temporary folder. All outputs are computed by transformers.
See README.md in this folder for what is stored, and for the one patch to transformers.
"""

import os
import platform
import sys
import tempfile
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # all files are local
import numpy as np
import tokenizers
import torch
import transformers

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from double import in_float64  # noqa: E402

from minitx.checkpoints.find import shipped  # noqa: E402
from minitx.checkpoints.hf_config import read_config  # noqa: E402
from minitx.checkpoints.huggingface import write_model  # noqa: E402
from minitx.config import Config  # noqa: E402
from minitx.lab.inside import STEPS  # noqa: E402
from minitx.lab.reference import (  # noqa: E402
    Reference,
    files_about,
    seeded_about,
    seeded_model,
    write_reference,
)
from minitx.training.stories import stories  # noqa: E402

INSIDE_ROWS = 2  # positions at which everything inside the blocks is stored
ROWS = 12  # positions whose outputs are stored; storing all would take 10 times the space
NEW_TOKENS = 32  # of greedy decoding
PROMPT = "Once upon a time"
DIFFICULT_TEXT = (
    "Zoë's\tnaïve café -- it'll cost £1,234.56!\n\n  北京 🙂🏽 e\u0301 \x00 <|endoftext|>they're  "
)

# Random models: an input longer than the blocks of 64 queries in minitx's attention.
LENGTH = 70
LLAMA = dict(family="llama", vocab_size=48, width=24, layers=3, head_width=4, hidden=40)
LLAMA |= dict(heads=6, kv_heads=2, rope_width=4, context=128)
GPT2 = dict(family="gpt2", vocab_size=48, width=24, layers=3, head_width=6, hidden=48)
GPT2 |= dict(heads=4, kv_heads=4, context=128, activation="gelu_tanh")
GPT2 |= dict(qkv_bias=True, out_bias=True, ffn_bias=True)
NEOX = GPT2 | dict(family="gpt_neox", activation="gelu", rope_width=4, parallel=True)

RANDOM = {
    "random-llama-mha": Config(**LLAMA | dict(kv_heads=6)),
    "random-llama-gqa": Config(**LLAMA),
    "random-llama-mqa": Config(**LLAMA | dict(kv_heads=1)),
    "random-llama-tied": Config(**LLAMA | dict(tied=True, norm_eps=1e-3)),
    "random-llama-wide-heads": Config(**LLAMA | dict(head_width=10, rope_width=10, heads=4)),
    "random-llama-narrow-heads": Config(
        **LLAMA | dict(width=26, heads=4, kv_heads=4, head_width=4, tied=True)
    ),
    "random-llama-biases": Config(**LLAMA | dict(qkv_bias=True, out_bias=True, ffn_bias=True)),
    "random-llama-base-100": Config(**LLAMA | dict(rope_base=100.0, norm_eps=1e-6)),
    "random-llama-base-1e6": Config(**LLAMA | dict(rope_base=1e6, head_width=8, rope_width=8)),
    "random-gpt2-gelu-tied": Config(**GPT2 | dict(tied=True)),
    "random-gpt2-relu-tied": Config(**GPT2 | dict(tied=True, activation="relu")),
    "random-gpt2-relu": Config(**GPT2 | dict(activation="relu", norm_eps=1e-3)),
    "random-neox-parallel": Config(**NEOX),
    "random-neox-parallel-tied": Config(**NEOX | dict(rope_width=6, rope_base=300.0, tied=True)),
    "random-neox-serial": Config(**NEOX | dict(parallel=False, rope_base=500.0)),
}

MODULES = {  # model type: module names of the blocks and of the final norm
    "llama": ("layers", "norm"),
    "mistral": ("layers", "norm"),
    "qwen2": ("layers", "norm"),
    "gpt2": ("h", "ln_f"),
    "gpt_neox": ("layers", "final_layer_norm"),
}

# Model type: module names inside a block. Those of qkv give queries, keys and values.
INSIDE = {
    "llama": {
        "attention norm": "input_layernorm",
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "out": "self_attn.o_proj",
        "FFN norm": "post_attention_layernorm",
        "FFN gate": "mlp.gate_proj",
        "FFN up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    "gpt2": {
        "attention norm": "ln_1",
        "qkv": ("attn.c_attn",),
        "out": "attn.c_proj",
        "FFN norm": "ln_2",
        "FFN up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
    "gpt_neox": {
        "attention norm": "input_layernorm",
        "qkv": ("attention.query_key_value",),
        "out": "attention.dense",
        "FFN norm": "post_attention_layernorm",
        "FFN up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
}
INSIDE |= {"mistral": INSIDE["llama"], "qwen2": INSIDE["llama"]}


def make_random(name: str, config: Config, seed: int) -> Reference:
    rng = np.random.default_rng(seed)
    ids, prompt = rng.integers(0, config.vocab_size, LENGTH), rng.integers(0, config.vocab_size, 8)
    with tempfile.TemporaryDirectory() as folder:
        write_model(seeded_model(config, seed), folder, "F32")
        return outputs(name, folder, ids, prompt, seeded_about(config, seed))


def make_shipped(name: str, folder: Path) -> Reference:
    """The input is the first evaluation story, as in-distribution text."""
    story = next(islice(stories("evaluation", "full", 0), 1)).text
    # The generic class uses tokenizer.json unchanged; a model-specific class might modify it.
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    texts = [(text, tokenizer(text)["input_ids"]) for text in (PROMPT, story, DIFFICULT_TEXT)]
    context = transformers.AutoConfig.from_pretrained(folder).max_position_embeddings
    prompt, ids = (np.array(ids[:context]) for _, ids in texts[:2])
    return outputs(name, folder, ids, prompt, files_about(folder) | {"texts": texts})


def outputs(name: str, folder, ids: np.ndarray, prompt: np.ndarray, about: dict) -> Reference:
    """The outputs of the folder's model in transformers, in float32 and float64."""
    rows = np.unique(np.linspace(0, len(ids) - 1, ROWS).round().astype(int))
    hidden, logits, greedy = {}, {}, {}
    for dtype in ("float32", "float64"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        ).eval()
        if dtype == "float64":
            in_float64(model)
        captured = capture_hidden_states(model)
        with recorded_blocks(model) as blocks:
            all_logits = model(torch.from_numpy(ids)[None], use_cache=False).logits
        hidden[dtype] = np.stack([x[0].numpy()[rows] for x in captured])  # (L + 2, R, D)
        logits[dtype] = all_logits[0].numpy()[rows]  # (R, V)
        assert hidden[dtype].dtype == logits[dtype].dtype == dtype
        greedy[dtype] = greedy_decode(model, prompt)
    # Two nearly tied tokens would make the completion depend on rounding.
    assert greedy["float32"] == greedy["float64"], f"{name}: choose another prompt or seed"
    about = about | {"versions": VERSIONS}
    few = np.linspace(0, len(ids) - 1, INSIDE_ROWS + 1).round().astype(int)[1:]
    inside = {}
    for step in STEPS:
        if step in blocks[0]:  # of the last run, in float64
            inside[step] = np.stack([block[step][few] for block in blocks])  # (L, I, ...)
            assert inside[step].dtype == np.float64
    return Reference(
        *(name, about, ids, rows, prompt, np.array(greedy["float64"]), hidden, logits),
        *(few, inside),
    )


def capture_hidden_states(model) -> list:
    """A list that the next forward pass fills with the input of the first block and the outputs of
    each block and of the final norm, each (1, T, D). (output_hidden_states of transformers does not
    include the output of the last block.)"""
    blocks, norm = (getattr(model.base_model, part) for part in MODULES[model.config.model_type])
    captured, handles = [], []

    def before_first_block(module, args, kwargs):
        captured.append(args[0] if args else kwargs["hidden_states"])

    def after_module(module, args, result):
        captured.append(result[0] if isinstance(result, tuple) else result)
        if module is norm:
            for handle in handles:
                handle.remove()

    handles += [blocks[0].register_forward_pre_hook(before_first_block, with_kwargs=True)]
    handles += [module.register_forward_hook(after_module) for module in (*blocks, norm)]
    return captured


@contextmanager
def recorded_blocks(model):
    """Within the context, a forward pass fills one dict per block: step -> values (T, ...)."""
    kind, config = model.config.model_type, model.config
    names, found, handles = INSIDE[kind], [], []
    parallel = kind == "gpt_neox" and config.use_parallel_residual

    for block in getattr(model.base_model, MODULES[kind][0]):
        into = {}
        found.append(into)

        def hook(name, on_output=None, on_input=None, block=block):
            def after(module, args, result):
                if on_input:
                    on_input(args[0][0].numpy())
                if on_output:
                    on_output(result[0].numpy())

            handles.append(block.get_submodule(name).register_forward_hook(after))

        def keep(step, into=into):
            return lambda values: into.update({step: values})

        hook(names["attention norm"], keep("attention norm"))
        for name, steps in zip(names["qkv"], projections(kind, config)):
            hook(name, lambda values, split=steps, into=into: into.update(split(values)))
        hook(names["out"], keep("attention output"), keep("weighted sum of the values"))
        before_ffn = None if parallel else keep("residual after attention")
        hook(names["FFN norm"], keep("FFN norm"), before_ffn)
        for step in ("FFN gate", "FFN up"):
            if step in names:
                hook(names[step], keep(step))
        hook(names["down"], keep("FFN output"), keep("hidden neurons"))

    attend, calls = torch.nn.functional.scaled_dot_product_attention, iter(found)

    def recorded_attend(q, k, v, **options):
        """Torch's own attention; with an identity matrix instead of the values it returns the
        attention weights."""
        into, kv_heads = next(calls), getattr(config, "num_key_value_heads", q.shape[1])
        if kind != "gpt2":
            into["rotated queries"] = q[0].transpose(0, 1).numpy()  # (T, H, d)
            each = k.shape[1] // kv_heads  # keys may have been repeated for every query head
            into["rotated keys"] = k[0, ::each].transpose(0, 1).numpy()  # (T, K, d)
        S = k.shape[2]
        identity = torch.eye(S, dtype=v.dtype).expand(*v.shape[:2], S, S)
        into["attention weights"] = attend(q, k, identity, **options)[0].transpose(0, 1).numpy()
        return attend(q, k, v, **options)

    torch.nn.functional.scaled_dot_product_attention = recorded_attend
    try:
        yield found
    finally:
        torch.nn.functional.scaled_dot_product_attention = attend
        for handle in handles:
            handle.remove()


def projections(kind: str, config) -> list:
    """One function for each module of "qkv": its output (T, columns) -> values by step."""
    if len(INSIDE[kind]["qkv"]) == 3:
        return [lambda values, step=step: {step: values} for step in QKV]
    if kind == "gpt2":  # all queries, then all keys, then all values
        return [lambda values: dict(zip(QKV, np.split(values, 3, -1)))]

    def of_heads(values):  # per head: its query, key and value
        by_head = values.reshape(len(values), config.num_attention_heads, 3, -1)
        return {step: by_head[:, :, i].reshape(len(values), -1) for i, step in enumerate(QKV)}

    return [of_heads]


QKV = ("queries", "keys", "values")


def greedy_decode(model, prompt: np.ndarray) -> list[int]:
    model.generation_config.eos_token_id = None  # do not stop at an end token
    ids = torch.from_numpy(prompt)[None]
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,  # unused: the batch has one row
    )
    return found[0, len(prompt) :].tolist()


VERSIONS = {
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "tokenizers": tokenizers.__version__,
    "numpy": np.__version__,
    "python": platform.python_version(),
}


def main(names: list[str]) -> None:
    known = {
        name: (make_shipped, folder)
        for name, folder in shipped().items()
        if not read_config(folder / "config.json").skipless  # not supported by transformers
    }
    for seed, (name, config) in enumerate(RANDOM.items()):
        known[name] = (make_random, config, seed)
    for name in names:
        if name not in known:
            sys.exit(f"NAME must be one of {', '.join(known)}; got {name!r}.")
    for name in names or known:
        make, *arguments = known[name]
        reference = make(name, *arguments)
        path = write_reference(reference, HERE)
        error = abs(reference.logits["float32"] - reference.logits["float64"]).max()
        print(
            f"{name}: {path.stat().st_size} bytes, logits up to "
            f"{abs(reference.logits['float64']).max():.2f}, float32 off by {error:.1e}, "
            f"{len(set(reference.greedy.tolist()))} distinct tokens in the greedy completion"
        )


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    main(sys.argv[1:])
