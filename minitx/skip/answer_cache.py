"""The answer cache: a request that was answered before is answered without running the model.

This file: the card and options, the token loop (online), the text that the normalized tier compares
(offline), notes. The key of a request is in shared/answer_key.py, the file with the answers in
shared/answer_store.py.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from minitx import ledger
from minitx.decode import Sampler
from minitx.errors import MinitxError
from minitx.model import Transformer
from minitx.shared.answer_key import digest_of, key_of, prompt_field, request
from minitx.shared.answer_loop import AnswerLoop
from minitx.shared.answer_store import MEMORY, AnswerStore, check_file, default_file
from minitx.shared.token_text import TokenText
from minitx.state import State
from minitx.technique import at_least, decides, technique
from minitx.tree import Part, part


@technique(
    level="answer",
    exact=True,
    neutral={"megabytes": 0.0},
    after=("cascade", "majority_vote", "router"),
    demo={"file": MEMORY},
    event="exact hits",
)
def answer_cache(
    lm,
    *,
    megabytes: Annotated[
        float, "size limit of all answers; 0: no cache", at_least(0, limit=1e6)
    ] = 64.0,
    file: Annotated[
        str | None,
        "file with the answers; memory: only in this process; None: answers.sqlite in the folder "
        "$MINITX_CACHE, by default ~/.cache/minitx",
    ] = None,
    normalize: Annotated[
        bool,
        "approximate: prompts that differ only in case, whitespace or Unicode form get the same "
        "answer",
    ] = False,
):
    """Answer a request that was answered before from a file, without running the model.

    Paper:     none. Kept results are called memo functions in Michie, "Memo functions and machine
               learning", Nature 218, 1968. The tiers are those of GPTCache (zilliztech/GPTCache).
    Fidelity:  our own: GPTCache keys on the last message and drops the temperature; here the key is
               everything that can change the answer.
    Kind:      exact: the tokens that were generated before for the same request. normalize=true is
               approximate: it may serve another prompt's answer.
    Idea:      The same model, prompt and settings give the same answer, so keep it.
    Offline:   nothing.
    Online:    key = sha256(canonical JSON of: version and source of minitx, NumPy and machine;
                     digest of the model (weights, techniques, settings) and of the loop inside;
                     temperature, top_k, top_p, seed, limit; token ids of the prompt)
               key in the file:  yield its ids; the model does not run
               otherwise:        run the inner loop; store the ids before the last one is yielded
               not deterministic (temperature above 0 without a seed): run the inner loop only
               above the size limit: evict the least recently used answers
    Saves:     the whole answer if a request is repeated; nothing if none is, as in minitx compare.
               Stored: 4 bytes per token, and about 250 per answer.
    In NumPy:  a hit takes 0.1 to 0.3 ms, however long the answer; a miss adds 0.2 ms. The first
               request of a process hashes the model (1.3 GB/s) and minitx's source: 15 ms more on
               stories.
    Not for:   answers that should differ each time: without a seed it does nothing. normalize=true
               is only for text in which case and whitespace do not matter: it treats "us" and "US"
               as one prompt.
    Proof:     tests/skip/test_answer_cache.py; literal version: tests/skip/literal_answer_cache.py
    Tutorial:  tutorials/17_answer_once.py
    """
    if not megabytes:
        return lm
    try:
        file = checked(file)
    except MinitxError as error:
        raise MinitxError(f"answer_cache: {error}") from None
    text = NormalizedText.of(lm) if normalize else None
    return replace(lm, decode=AnswerCache(lm.decode, AnswerStore(file, megabytes), text, lm.name))


def checked(file: str | None) -> str | None:
    """The file as an absolute path. MinitxError, before any work is done, if it cannot hold
    answers."""
    if file is None or file == MEMORY:
        check_file(default_file() if file is None else file)
        return file
    path = Path(file).expanduser().absolute()
    check_file(path)
    if not path.parent.is_dir():
        raise MinitxError(f"{path}: there is no folder {path.parent}; create it first.")
    return str(path)


# Online ------------------------------------------------------------------------------------------


@part
class AnswerCache(AnswerLoop):
    """Yields the stored answer, or runs the inner loop and stores what it yields."""

    inner: Part
    store: Part
    text: Part | None  # of the normalized tier
    name: str  # of the model, for minitx cache stats

    def __call__(
        self, model: Transformer, state: State, ids: Sequence[int], choose: Sampler, limit: int
    ) -> Iterator[int]:
        """Yield at most ``limit`` tokens after the prompt ``ids``: see ``TokenLoop``. If the caller
        goes on after the end of a stored text, the model runs after all."""
        held = state.position if state.position and decides(model) != "token" else 0
        found, answer = self.begin(model, ids, choose, limit, held)
        yield from found
        if len(found) == limit:
            return
        for i, token in enumerate(self.inner(model, state, ids, choose, limit)):
            answer.add(token)
            if i >= len(found):  # the first ones have been yielded
                yield token

    def begin(
        self, model: Transformer, ids: Sequence[int], choose: Sampler, limit: int, held: int = 0
    ) -> "tuple[list[int], Answer]":
        """The stored answer or [], and the one to be generated: see ``AnswerLoop``."""
        asked = self.ask(model, ids, choose, limit, held)
        return self.look_up(model, asked), Answer(self, model, asked)

    def ask(self, model, ids, choose: Sampler, limit: int, held: int = 0) -> "Request | None":
        """The request, or None if it is not deterministic."""
        fields = request(model, self.inner, choose, limit, held)
        if fields is None or not limit:
            return None
        key, near = key_of(fields | {"prompt": prompt_field(ids)}), None
        if self.text is not None:
            # Not the limit: by default it depends on the prompt's length.
            fields |= {"limit": None, "text": self.text(ids), "vocabulary": digest_of(self.text)}
            near = key_of(fields)
        return Request(key, near, limit)

    def look_up(self, model: Transformer, asked: "Request | None") -> list[int]:
        """The stored answer; [] if there is none."""
        if asked is None:
            ledger.event("bypassed")
            return []
        if found := asked.fit(model, self.store.find(asked.key)):
            ledger.event("exact hits")
            return found
        if asked.near and (found := asked.fit(model, self.store.find_near(asked.near))):
            ledger.event("normalized hits")
            return found
        ledger.event("misses")
        return []


class Request:
    """What is asked for: its key, its key in the normalized tier (or None), and the limit."""

    def __init__(self, key: bytes, near: bytes | None, limit: int):
        self.key, self.near, self.limit = key, near, limit

    def fit(self, model: Transformer, ids: list[int] | None) -> list[int]:
        """The ids up to the limit; [] if they are not a complete answer."""
        ids = (ids or [])[: self.limit]
        ends = model.config.eos
        complete = ids and (len(ids) == self.limit or ids[-1] in ends)
        return ids if complete and max(ids) < model.config.vocab_size else []


class Answer:
    """An answer that is being generated. It is stored when it is complete: at the first
    end-of-text, and once more at the limit if the caller goes on until then."""

    def __init__(self, cache: AnswerCache, model: Transformer, asked: Request | None):
        self.cache, self.ends, self.asked = cache, model.config.eos, asked
        self.ids: list[int] = []
        self.ended = False

    def add(self, token: int) -> None:
        """Called before the token is yielded, since the caller may not come back after the last."""
        if self.asked is None:
            return
        self.ids.append(token)
        ends = token in self.ends and not self.ended
        if ends or len(self.ids) == self.asked.limit:
            self.cache.store.put(self.asked.key, self.ids, self.cache.name, self.asked.near)
        self.ended |= ends


# Offline: the normalized tier --------------------------------------------------------------------


@part
class NormalizedText(Part):
    """The text of a prompt, in which case, spaces and the Unicode form make no difference."""

    tokens: Part
    bos: int | None = None  # in front of every prompt, which is no letter of its first word

    @classmethod
    def of(cls, lm) -> "NormalizedText":
        if lm.tokenizer is None:
            raise MinitxError(
                "answer_cache needs a tokenizer to normalize prompts, and this model has none; "
                "load it with tokenizer=PATH, or leave out normalize."
            )
        return cls(TokenText.of(lm.tokenizer), lm.model.config.bos)

    def __call__(self, ids: Sequence[int]) -> str:
        ids = ids[1:] if ids[0] == self.bos else ids
        # Bytes that are no UTF-8 stay different from each other.
        return normalized(self.tokens(ids).decode("utf-8", "surrogateescape"))


def normalized(text: str) -> str:
    """Unicode form NFC, case folded, and one space for each run of whitespace."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


# Notes:
#
# - minitx generate "Once upon a time" --answer-cache, on stories, one thread: 424 ms the first time
#   and 267 ms the second, of which starting Python and reading the model take about 240. Within one
#   process a hit of 100 tokens took 0.3 ms where generating them took 600 (a busy machine).
# - An answer is not stored if its caller stopped early or its generation failed. A text is stored
#   up to its end, and again, longer, for a caller that goes on after it (minitx compare does).
# - A hit leaves the state and the sampler unchanged; lm.generate makes new ones for each request. A
#   sampler that has drawn before is bypassed: its next text differs from its first.
# - Where parts decide for all tokens of a step together, the answer may depend on how the prompt
#   was divided into steps, so the key has the number of tokens that were run before. Where every
#   part decides token by token, it has not, and a state that holds part of the prompt hits too.
# - The key has a hash of minitx's source, so editing any of its files invalidates all answers. It
#   has NumPy's version and the kind of machine, but not the number of BLAS threads, nor which
#   kernels BLAS picks for the CPU: these change the rounding, which decides only between two logits
#   that tie within it. What is served then is what was generated elsewhere.
# - Weights that are changed in place are not noticed: the digest of a model is computed once.
# - The limit belongs to the key, although a text that ended before it would be the same under any
#   larger one: a loop may depend on it. The normalized tier leaves it out, since by default it
#   depends on the prompt's length; a stored answer that is longer is truncated.
# - The normalized tier reads the tokens' text, so it needs a tokenizer when it is applied. It
#   ignores case, whitespace and composed characters only, not synonyms or word order. Its hits are
#   counted separately ("normalized hits"), so a report shows how many were another prompt's.
# - minitx compare, batch and first-token measure with an empty store in memory and leave the file
#   alone; minitx cache stats shows what is in it, minitx cache clear empties it.
