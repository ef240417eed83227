"""The language model, root of the tree: a tokenizer, a transformer, and a way to decode.

This file checks prompts, encodes them, and turns new ids into text. decode.py samples the next
token, model.py computes its logits.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any

import numpy as np

from minitx.decode import Autoregressive, Sampler, new_state, number
from minitx.errors import MinitxError, abbreviate
from minitx.memory_layout import to_column_major
from minitx.model import Transformer
from minitx.text import start_of
from minitx.tree import Part, part

Prompt = str | Sequence[int]


@part
class LM(Part):
    """A language model. ``print(lm.model)`` draws what runs.

    tokenizer: has ``encode(text) -> ids`` and ``decode(ids) -> text`` (checkpoints/tokenizer.py);
    None for a model that is used with ids only. decode: the decoding loop, a part like any other.
    folder: where the model was read from; further files of it may be there. calibration: where
    techniques take calibration ids from; None: stories. calibrated: what they were calibrated on
    (calibration.py).
    """

    model: Transformer
    tokenizer: Any = None
    decode: Part = field(default_factory=Autoregressive)
    name: str = ""
    folder: Path | None = None
    calibration: Any = None
    calibrated: tuple = ()

    def logits(self, ids) -> np.ndarray:
        """Logits (T, V) of a sequence of ids (T,), or (B, T, V) of a batch (B, T); row t scores
        the token that follows ids[t]."""
        return self.model(self.check_ids(ids))

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ):
        """The completion of a prompt: text for text, a list of ids for ids, a list for a batch.

        It ends before the model's end-of-text token, or after ``max_new_tokens`` (default: fill the
        context, or the limit in the folder's generation_config.json). The prompt is not repeated in
        the result. It is decoded greedily, unless a temperature above 0 is given, or one of top_k,
        top_p and seed, which imply a temperature of 1 (``decode.Sampler``). The prompts of a batch
        may differ in length (the longest one limits the number of new tokens); row i equals what it
        would be alone, except for rounding in the last bits of the logits, and is sampled with seed
        ``seed + i``.
        """
        options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
        if _is_batch(prompt):
            return self._generate_batch(prompt, max_new_tokens, seed, options)
        if isinstance(prompt, str):
            return "".join(self.stream(prompt, max_new_tokens, seed=seed, **options))
        return list(self.tokens(prompt, max_new_tokens, seed=seed, **options))

    def stream(self, prompt: Prompt, max_new_tokens: int | None = None, **options) -> Iterator[str]:
        """The text of ``generate``, streamed in pieces of whole characters: a character that spans
        several tokens is held back until it is complete.

        One prompt, text or ids; options as for ``generate``. Bad input is refused immediately, not
        when the first piece is requested.
        """
        ids = self.encode(prompt)
        return self.pieces(self.tokens(ids, max_new_tokens, **options), ids[-1])

    def tokens(self, prompt: Prompt, max_new_tokens: int | None = None, **options) -> Iterator[int]:
        """The ids of ``generate``, streamed one by one; otherwise like ``stream``."""
        ids = self.encode(prompt)
        limit = self._room(len(ids), max_new_tokens)
        state = new_state(self.model, ids)
        return self._until_end(self.decode(self.model, state, ids, Sampler(**options), limit))

    def pieces(self, tokens: Iterable[int], previous: int) -> Iterator[str]:
        """The text of a stream of ids, as ``stream`` yields it. ``previous``, the id before them,
        decides whether a leading space is written."""
        self.need_tokenizer()
        return _decoded(self.tokenizer, tokens, previous)

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids of one prompt. Text goes through the tokenizer (which adds a beginning-of-text
        token if the model has one); ids are checked. An empty text starts from the beginning- or
        end-of-text token."""
        if not isinstance(prompt, str):
            ids = self.check_ids(prompt)
            if ids.ndim != 1:
                raise MinitxError(
                    f"Expected one text or one list of token ids, got an array of shape "
                    f"{ids.shape}; for several prompts use generate."
                )
            return ids.tolist()
        self.need_tokenizer()
        return self.check_ids(self.tokenizer.encode(prompt) or start_of(self)).tolist()

    # Checks ---------------------------------------------------------------------------------------

    def check_ids(self, ids, any_length: bool = False) -> np.ndarray:
        """The ids as an array of integers; refused if empty, outside the vocabulary, or longer than
        the context (unless ``any_length``)."""
        try:
            array = np.asarray(ids)
        except ValueError:
            raise MinitxError(
                "Expected token ids in rows of equal length, got rows of different lengths; pad "
                "them, or use generate for prompts of different lengths."
            ) from None
        config = self.model.config
        if array.ndim == 0:
            raise MinitxError(
                f"Expected a list of token ids, got {abbreviate(ids)}; use lm.encode(text) to make "
                "one."
            )
        if array.size == 0:
            raise MinitxError("The prompt is empty; give at least one token.")
        if array.dtype.kind not in "iu":
            raise MinitxError(
                f"Expected integer token ids, got {abbreviate(ids)} of type {array.dtype}; use "
                "lm.encode(text) to make ids from text."
            )
        if array.min() < 0 or array.max() >= config.vocab_size:
            bad = array.min() if array.min() < 0 else array.max()
            raise MinitxError(
                f"Token id {bad} is outside the vocabulary of {config.vocab_size}; "
                "is this the tokenizer that belongs to the model?"
            )
        if array.shape[-1] > config.context and not any_length:
            raise MinitxError(
                f"The prompt has {array.shape[-1]} tokens but the context is {config.context}; "
                "shorten it."
            )
        return array

    def _room(self, length: int, wanted: int | None) -> int:
        """The number of new tokens after a prompt of ``length``; refused if they do not fit."""
        room = self.model.config.context - length
        if wanted is None:
            return self.model.config.new_tokens(length)
        wanted = number("max_new_tokens", wanted)
        if wanted > room:
            raise MinitxError(
                f"A prompt of {length} tokens plus {abbreviate(wanted)} new ones exceeds the "
                f"context of {length + room}; use a shorter prompt or at most {room} new tokens."
            )
        return wanted

    def need_tokenizer(self) -> None:
        """MinitxError for a model that has no tokenizer."""
        if self.tokenizer is None:
            raise MinitxError(
                "This model has no tokenizer, so it takes token ids, not text; load it with "
                "tokenizer=PATH to use text."
            )

    # Work -----------------------------------------------------------------------------------------

    def _until_end(self, tokens: Iterator[int]) -> Iterator[int]:
        for token in tokens:
            if token in self.model.config.eos:
                return
            yield token

    def _generate_batch(self, prompts, max_new_tokens, seed: int | None, options: dict) -> list:
        encoded = [self.encode(prompt) for prompt in prompts]
        limit = self._room(max(map(len, encoded)), max_new_tokens)
        first = Sampler(seed=seed, **options)  # which checks and converts the options
        choosers = [first]
        for row in range(1, len(encoded)):
            seed = None if first.seed is None else first.seed + row
            choosers.append(Sampler(first.temperature, first.top_k, first.top_p, seed))
        rows = self._rows(encoded, choosers, limit)
        return [
            "".join(self.pieces(row, ids[-1])) if isinstance(prompt, str) else row
            for prompt, ids, row in zip(prompts, encoded, rows)
        ]

    def _rows(self, prompts, choosers, limit: int) -> list[list[int]]:
        """The new ids of each row up to its end-of-text. Finished rows keep running until all are,
        unless the loop drops them."""
        rows: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        for tokens in self.decode.batch(self.model, prompts, choosers, limit):
            going -= {i for i in going if tokens[i] in self.model.config.eos}
            if not going:
                break
            for i in going:
                rows[i].append(tokens[i])
        return rows


def _decoded(tokenizer, tokens: Iterable[int], previous: int) -> Iterator[str]:
    # Imported here, because the core does not depend on checkpoints.
    from minitx.checkpoints.tokenizer import StreamDecoder

    decoder = StreamDecoder(tokenizer, previous)
    for token in tokens:
        if piece := decoder.push(token):
            yield piece
    if piece := decoder.finish():
        yield piece


def _is_batch(prompt) -> bool:
    """Several texts or lists of ids, rather than a single one?"""
    if isinstance(prompt, np.ndarray):
        return prompt.ndim > 1 and len(prompt) > 0
    if isinstance(prompt, str | bytes) or not isinstance(prompt, Sequence) or not prompt:
        return False
    return isinstance(prompt[0], Sequence | np.ndarray)


def load(
    name_or_path: str | Path,
    tokenizer: str | Path | bool | None = None,
    dtype=np.float32,
    calibrate=None,
    **techniques,
) -> LM:
    """Load a shipped model by name (``stories``), a Hugging Face folder, a llama2.c ``.bin`` file,
    or a folder that ``minitx precompute`` wrote.

    tokenizer: the folder or file of the tokenizer, if it is not beside the model. False: none, so
    that the model works on ids only, whatever tokenizer files there are. dtype: float32, or float64
    for tests. techniques: by name, True or a dict of options: ``load("stories", fold_norms=True,
    ffn_skip={"threshold": 0.95})``. calibrate: what techniques that calibrate read instead of
    stories: a text (``minitx.text.read_text`` reads one from a file), or token ids, one list or
    several.
    Raises MinitxError if there is no such model or technique, or if a file is damaged.
    """
    from minitx.checkpoints.find import name_of, read_language_model

    found = read_language_model(name_or_path, tokenizer, dtype)
    path = found.path
    folder = path if path.is_dir() else None
    lm = LM(found.model, found.tokenizer, found.decode, name_of(path), folder)
    lm = replace(lm, calibrated=found.calibrated)
    if not techniques and calibrate is None:
        return to_column_major(lm)
    from minitx.technique import apply

    return apply(lm, techniques, calibrate)
