"""The key of an answer: a hash of everything that can change what is generated.

    fields = request(model, loop, choose, limit)   # None: not deterministic, so no answer is kept
    key_of(fields | {"prompt": ids})               # 32 bytes, the same in every process

A cache that leaves something out of its key serves the answer to another question.
"""

import json
import platform
import random
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from weakref import WeakKeyDictionary

import numpy as np

import minitx
from minitx.decode import Sampler
from minitx.digest import digest, source_digest
from minitx.tree import Part

KEY_VERSION = 1
_digests: WeakKeyDictionary = WeakKeyDictionary()  # part -> its digest in hex


def request(model: Part, loop: Part, choose: Sampler, limit: int, held: int = 0) -> dict | None:
    """Everything except the prompt that can change the answer, as plain values; None if the same
    request may have several answers: the sampler has no seed, or has drawn already.

    loop: the decoding loop that would generate the answer. held: tokens of the prompt that were run
    in a step of their own, if the model depends on how a prompt is divided into steps."""
    if not is_deterministic(choose):
        return None
    return {
        "version": KEY_VERSION,
        "minitx": minitx.__version__,
        "source": source_digest().hex(),
        **rounding(),
        "model": digest_of(model),  # weights in their dtype, techniques, settings
        "loop": digest_of(loop),  # with its second model, if it has one
        "temperature": float(choose.temperature) + 0.0,  # -0.0 is 0.0
        "top_k": None if choose.top_k is None else int(choose.top_k),
        "top_p": None if choose.top_p is None else float(choose.top_p),
        "seed": None if choose.seed is None else int(choose.seed),
        "limit": int(limit),
        "held": int(held),
    }


def key_of(fields: dict) -> bytes:
    """sha256 of the fields as canonical JSON: names sorted, no spaces, no NaN. Numbers must have
    been converted: 1, 1.0 and True are equal in Python, but three texts in JSON."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(text.encode()).digest()


def prompt_field(ids: Sequence[int]) -> list[int]:
    """The ids as a list: concatenated digits would be the same for 1 23 and 12 3."""
    return [int(i) for i in ids]


def digest_of(part: Part) -> str:
    """The digest of a part in hex, computed once while the part exists (1.3 GB/s)."""
    if part not in _digests:
        _digests[part] = digest(part).hex()
    return _digests[part]


def is_deterministic(choose: Sampler) -> bool:
    """Does the sampler always choose the same tokens? A greedy one does, and so does one with a
    seed that has not drawn yet. A subclass may do anything."""
    if type(choose) is not Sampler:
        return False
    if choose.temperature == 0:
        return True
    numbers = getattr(choose.uniform, "__self__", None)
    fresh = type(numbers) is random.Random and choose.seed is not None
    return fresh and numbers.getstate() == random.Random(int(choose.seed)).getstate()


@cache
def rounding() -> dict:
    """What decides how products are rounded, and so the token where two logits nearly tie."""
    return {"numpy": np.__version__, "machine": platform.machine()}
