"""The key of an answer: whatever may change the answer changes it, and nothing else does."""

import random
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest
from tiny import tiny_lm

import minitx
from minitx.decode import Sampler
from minitx.shared import answer_key
from minitx.shared.answer_key import is_deterministic, key_of, prompt_field, request
from minitx.technique import apply

FIELDS = {
    "v": 1,
    "model": "sha256:ab12",
    "tok": "sha256:cd34",
    "dtype": "float32",
    "tech": ["early_exit:0.9"],
    "max_new": 16,
    "temperature": 0.0,
    "seed": None,
    "prompt": [1, 2, 3],
}


def test_key_is_the_hash_of_sorted_json_without_spaces():
    text = (
        '{"dtype":"float32","max_new":16,"model":"sha256:ab12","prompt":[1,2,3],"seed":null,'
        '"tech":["early_exit:0.9"],"temperature":0.0,"tok":"sha256:cd34","v":1}'
    )
    assert key_of(FIELDS) == sha256(text.encode()).digest()
    assert key_of(FIELDS).hex().startswith("1ba9fab7621eecfa")


def test_order_of_the_fields_does_not_matter_and_each_field_does():
    names = list(FIELDS)
    for seed in range(5):
        random.Random(seed).shuffle(names)
        assert key_of({name: FIELDS[name] for name in names}) == key_of(FIELDS)
    keys = {key_of(FIELDS | {name: "another"}) for name in FIELDS} | {key_of(FIELDS)}
    assert len(keys) == len(FIELDS) + 1, "a field is not part of the key"
    assert key_of(FIELDS | {"prompt": [12, 3]}) != key_of(FIELDS | {"prompt": [1, 23]})
    with pytest.raises(ValueError):
        key_of(FIELDS | {"temperature": float("nan")})


def fields(lm=None, limit=8, held=0, **options) -> dict:
    lm = tiny_lm() if lm is None else lm
    return request(lm.model, lm.decode, Sampler(**options), limit, held)


def test_whatever_can_change_the_answer_changes_the_key(monkeypatch):
    changed = {
        "weights": fields(tiny_lm(model=tiny_lm("llama").model, tokenizer=None)),  # the same
        "dtype": fields(tiny_lm(dtype=np.float64)),
        "family": fields(tiny_lm("gpt2")),
        "technique": fields(apply(tiny_lm(), {"ffn_skip": True})),
        "setting": fields(apply(tiny_lm(), {"ffn_skip": {"threshold": 0.5}})),
        "loop": fields(apply(tiny_lm(), {"speculative": {"draft": "self"}})),
        "loop's setting": fields(apply(tiny_lm(), {"speculative": {"draft": "self", "gamma": 2}})),
        "limit": fields(limit=9),
        "division into steps": fields(held=2),
        "temperature": fields(temperature=0.5, seed=1),
        "another temperature": fields(temperature=0.5000001, seed=1),
        "top_k": fields(temperature=0.5, seed=1, top_k=3),
        "top_p": fields(temperature=0.5, seed=1, top_p=0.75),
        "seed": fields(temperature=0.5, seed=2),
    }
    for what, attribute, value in (
        ("version", (minitx, "__version__"), "0.0.9"),
        ("source", (answer_key, "source_digest"), lambda: b"edited"),
        ("NumPy", (answer_key, "rounding"), lambda: {"numpy": "1", "machine": "m"}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(*attribute, value)
            changed[what] = fields()
    keys = {key_of(found | {"prompt": [1, 2]}): what for what, found in changed.items()}
    assert keys[key_of(fields() | {"prompt": [1, 2]})] == "weights", "equal models differ"
    assert len(keys) == len(changed), "two of them have the same key"


def test_numbers_of_any_type_give_the_same_key():
    """1, 1.0, True and NumPy's 1 are equal, but written differently in JSON."""
    by_hand = Sampler(temperature=1, top_k=1, seed=1)
    by_hand.temperature, by_hand.top_k, by_hand.seed = True, True, np.int64(1)
    lm = tiny_lm()
    expected = fields(temperature=1.0, top_k=1, seed=1, limit=1)
    for limit in (True, 1.0, np.int32(1)):
        assert key_of(request(lm.model, lm.decode, by_hand, limit)) == key_of(expected)
    assert key_of(fields(temperature=np.float32(0.5), seed=1)) == key_of(
        fields(temperature=0.5, seed=np.uint8(1))
    )
    minus = Sampler(temperature=0)
    minus.temperature = -0.0
    assert request(lm.model, lm.decode, minus, 8) == fields(temperature=0)
    assert prompt_field(np.array([1, 2], np.uint16)) == prompt_field((1, np.int64(2))) == [1, 2]


class Other(Sampler):
    """May do anything."""


def test_only_requests_with_one_answer_have_a_key():
    assert is_deterministic(Sampler()) and is_deterministic(Sampler(temperature=0.7, seed=0))
    assert not is_deterministic(Sampler(temperature=0.7)), "without a seed runs differ"
    assert not is_deterministic(Other())
    drawn = Sampler(seed=1)
    drawn.uniform()
    assert not is_deterministic(drawn), "its next number is not the first of the seed"
    replaced = Sampler(seed=1)
    replaced.uniform = lambda: 0.5
    assert not is_deterministic(replaced)
    assert fields(temperature=0.7) is None


PROCESS = """
import sys
sys.path[:0] = ["tests"]
from tiny import tiny_lm
from minitx.decode import Sampler
from minitx.shared.answer_key import key_of, request
lm = tiny_lm()
print(key_of(request(lm.model, lm.decode, Sampler(seed=3), 8)).hex())
"""


def test_key_is_the_same_in_another_process():
    found = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True)
    assert found.stdout.strip() == key_of(fields(seed=3)).hex(), found.stderr
