"""The language model, root of the tree: a tokenizer, a transformer, and a way to decode."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minitx.decode import Autoregressive, Sampler
from minitx.errors import MinitxError
from minitx.model import Transformer
from minitx.tree import Part

Prompt = str | Sequence[int]


@dataclass(frozen=True, eq=False)
class LM:
    """A model that can be used. ``print(lm.model)`` draws what runs.

    tokenizer: has ``encode(text) -> ids`` and ``decode(ids) -> text``; None for a model on ids.
    decode: the part that turns prompts into new tokens.
    """

    model: Transformer
    tokenizer: Any = None
    decode: Part = field(default_factory=Autoregressive)
    name: str = ""

    def logits(self, ids) -> np.ndarray:
        """Logits (T, V) of a sequence of ids (T,), or (B, T, V) of a batch (B, T); row t scores
        the token that follows ids[t]."""
        return self.model(self._checked(ids))

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ):
        """What follows the prompt: text for text, a list of ids for ids, a list for a batch.

        It ends at the model's end-of-text token or after ``max_new_tokens`` (as many as the context
        has room for, if not given). The prompt is not repeated in the result.
        """
        options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
        if not _is_batch(prompt):
            new = list(self.tokens(prompt, max_new_tokens, seed=seed, **options))
            return self.tokenizer.decode(new) if isinstance(prompt, str) else new
        prompts = [self.encode(p) for p in prompt]
        if not prompts:
            return []
        limit = self._room(max(map(len, prompts)), max_new_tokens)
        choosers = [
            Sampler(seed=None if seed is None else seed + row, **options)
            for row in range(len(prompts))
        ]
        rows = self._batch(prompts, choosers, limit)
        return [
            self.tokenizer.decode(new) if isinstance(p, str) else new for p, new in zip(prompt, rows)
        ]

    def stream(
        self, prompt: Prompt, max_new_tokens: int | None = None, **options
    ) -> Iterator[str]:
        """The same as ``generate``, piece by piece as it comes, always whole characters: one that
        is split over several tokens is held back until it is complete."""
        if self.tokenizer is None:
            raise MinitxError(
                "This model has no tokenizer, so it cannot stream text; use tokens(ids) instead."
            )
        ids = self.encode(prompt)
        return self._pieces(ids[-1], self.tokens(ids, max_new_tokens, **options))

    def tokens(
        self, prompt: Prompt, max_new_tokens: int | None = None, **options
    ) -> Iterator[int]:
        """The new token ids one by one; the end-of-text token ends them and is not given. Bad
        input is refused at once, before the first token is asked for."""
        ids = self.encode(prompt)
        limit = self._room(len(ids), max_new_tokens)
        choose = Sampler(**options)
        return self._until_end(self.decode(self.model, ids, choose, limit))

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt: text as the tokenizer encodes it (which knows whether a token goes before
        it); ids are checked. An empty text starts from the token that begins or ends a text."""
        if not isinstance(prompt, str):
            return self._checked(prompt).tolist()
        if self.tokenizer is None:
            raise MinitxError(
                "This model has no tokenizer; give a list of ids, or load it with tokenizer=PATH."
            )
        config = self.model.config
        start = (config.eos if config.bos is None else (config.bos,))[:1]
        return self._checked(self.tokenizer.encode(prompt) or start).tolist()

    def _checked(self, ids) -> np.ndarray:
        """The ids as an integer array, refused if any is outside the vocabulary or too many."""
        try:
            array = np.asarray(ids)
        except ValueError:
            raise MinitxError("The ids form rows of unequal length; give rows of one length.")
        config = self.model.config
        if array.size == 0:
            raise MinitxError("The prompt is empty; at least one token is needed to start from.")
        if array.dtype.kind not in "iu":
            raise MinitxError(f"The ids are of type {array.dtype}; whole numbers are needed.")
        if array.min() < 0 or array.max() >= config.vocab_size:
            bad = array.min() if array.min() < 0 else array.max()
            raise MinitxError(
                f"Token id {bad} is outside the vocabulary of {config.vocab_size}; "
                "is this the tokenizer that belongs to the model?"
            )
        if array.shape[-1] > config.context:
            raise MinitxError(
                f"{array.shape[-1]} tokens do not fit the model's context of {config.context}; "
                "use fewer."
            )
        return array

    def _room(self, length: int, wanted: int | None) -> int:
        """How many new tokens to make after a prompt of ``length``, refused if they do not fit."""
        context = self.model.config.context
        # The last new token is never fed back, but it still counts as part of the sequence.
        if wanted is None:
            wanted = max(context - length, 0)
        if wanted != int(wanted) or wanted < 0:
            raise MinitxError(
                f"max_new_tokens is {wanted}; a whole number of at least 0 is needed."
            )
        if length + wanted > context:
            raise MinitxError(
                f"A prompt of {length} tokens and {wanted} new ones do not fit the model's context "
                f"of {context}; use a shorter prompt or at most {max(context - length, 0)} new tokens."
            )
        return int(wanted)

    def _until_end(self, tokens: Iterator[int]) -> Iterator[int]:
        for token in tokens:
            if token in self.model.config.eos:
                return
            yield token

    def _pieces(self, previous: int, tokens: Iterator[int]) -> Iterator[str]:
        from minitx.files.tokenizer import StreamDecoder

        decoder = StreamDecoder(self.tokenizer, previous)
        for token in tokens:
            if piece := decoder.push(token):
                yield piece
        if piece := decoder.finish():
            yield piece

    def _batch(self, prompts, choosers, limit: int) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in prompts]
        live = set(range(len(prompts)))
        for ids in self.decode.batch(self.model, prompts, choosers, limit):
            for i in sorted(live):
                if ids[i] in self.model.config.eos:
                    live.discard(i)
                else:
                    rows[i].append(int(ids[i]))
            if not live:
                break
        return rows


def _is_batch(prompt) -> bool:
    """A list of texts or of id lists, as opposed to one text or one list of ids."""
    return not isinstance(prompt, str) and any(isinstance(p, str) or np.ndim(p) for p in prompt)


def load(name_or_path: str | Path, tokenizer: str | Path | None = None, dtype=np.float32) -> LM:
    """A language model by the name of a shipped one (``stories``), or from a Hugging Face folder
    or a llama2.c ``.bin`` file. ``tokenizer``: a folder or file to read the tokenizer from, if it
    does not stand beside the model. A folder without one still loads and works on ids."""
    from minitx.files.find import read

    model, its_tokenizer, name = read(name_or_path, tokenizer, dtype)
    return LM(model, its_tokenizer, name=name)
