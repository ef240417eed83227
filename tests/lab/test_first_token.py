"""``minitx first-token``: what its prompts share, what it counts, when caches are cleared."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import tiny_lm

import minitx
from minitx import technique as module
from minitx.cli import main
from minitx.errors import MinitxError
from minitx.lab import first_token as lab
from minitx.lab.compare import forget
from minitx.lab.first_token import PromptSet, first_token, prompts
from minitx.technique import apply

PLAN = PromptSet(shared=20, own=5, prompts=3, rounds=2)
BARE = dict(tokenizer=None)


def cached(lm, **options):
    return apply(lm, {"prefix_cache": {"block": 4} | options})


@pytest.mark.parametrize("changes", [{}, BARE], ids=["stories", "random ids"])
def test_prompts_share_only_their_prefix(changes):
    lm = tiny_lm(**changes)
    texts = prompts(lm, 20, 15, 4)
    assert [len(text) for text in texts] == [35] * 4
    assert all(text[:20] == texts[0][:20] for text in texts)
    assert len({text[20] for text in texts}) == 4
    assert prompts(lm, 20, 15, 4) == texts, "they are always the same"


def test_counts_for_new_prompt_and_shared_prefix():
    """25 tokens, of which 20 are known the second time: 5 are run, in which each product of a layer
    is 5/25; scores and values are 2 d (T - m) T in place of 2 d T T, which is 5/25 as well; the
    head reads one token both times."""
    dense = tiny_lm(**BARE)
    changed = cached(dense)
    changed.generate(prompts(dense, 20, 5, 1)[0], 1)  # what came before is not to be seen
    found = first_token(dense, changed, "--prefix-cache", PLAN, bar=False)
    assert found.new.events == {"prompt tokens run": 25} and found.new.multiply_adds == 1
    assert found.known.events == {"prompt tokens reused": 20, "prompt tokens run": 5}
    head, blocks = 16 * 259, 2 * (25 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24) + 2 * 2 * 8 * 25**2)
    assert found.known.multiply_adds == pytest.approx((head + blocks / 5) / (head + blocks))
    assert found.cache_bytes == 2 * 2 * 8 * 4
    assert found.new.ratio[1] <= found.new.ratio[0] <= found.new.ratio[2]
    text = str(found)
    assert (
        "20 prompt tokens reused, 5 prompt tokens run" in text and "128 bytes of KV cache" in text
    )
    json.dumps(found.as_dict())


def test_times_for_new_prompt_and_shared_prefix(monkeypatch):
    """A clock that counts the tokens run instead of seconds."""
    dense = tiny_lm(**BARE)
    changed, seen = cached(dense), []

    def counted(lm, prompt):
        with counting(lm) as counts:
            next(lm.tokens(prompt, 1), None)
        run = counts.events.get("prompt tokens run", 25)
        seen.append((lm is changed, run))
        return float(run)

    counting, real = lab.counting, lab.until_first
    calls = iter(range(99))
    # the first four calls are those that are counted, not timed
    monkeypatch.setattr(lab, "until_first", lambda *a: (real if next(calls) < 4 else counted)(*a))
    found = first_token(dense, changed, "", PLAN, bar=False)
    assert (found.new.dense, found.new.changed, found.new.ratio) == (25, 25, (1, 1, 1))
    assert (found.known.dense, found.known.changed, found.known.ratio) == (25, 5, (5, 5, 5))
    rounds = [(False, 25), (True, 25)] + [
        (False, 25),
        (True, 5),
    ] * 2  # every round starts with empty caches
    assert seen == rounds * 2, "dense and changed take turns"


def test_forget_clears_every_cache():
    lm = cached(tiny_lm(), megabytes=1.0)
    lm.generate(list(range(20)), 3)
    assert lm.decode.store.blocks
    forget(lm)
    assert not lm.decode.store.blocks


def test_comparison_starts_every_pass_with_empty_caches(monkeypatch):
    from minitx.lab import compare

    dense, held, prompt = tiny_lm(**BARE), [], np.arange(9).tolist()
    lm = cached(dense)
    lm.generate(prompt, 1)
    real = compare.continuation

    def watched(lm, prompt):
        if lm.decode is not dense.decode:
            held.append(len(lm.decode.store.blocks))
        return real(lm, prompt)

    monkeypatch.setattr(compare, "continuation", watched)
    prompts = [prompt, prompt[:8] + [99]]
    texts, counts = compare.continue_all(dense, prompts, lambda: None)
    known = SimpleNamespace(lm=dense, prompts=prompts, continuations=texts, counts=counts)
    found = compare.generate(known, lm, 2, lambda: None)
    assert found.events == {"prompt tokens reused": 8, "prompt tokens run": 10}
    assert held[0::2] == [0, 0, 0] and all(n > 0 for n in held[1::2])
    assert found.same == 2


@pytest.mark.parametrize(
    "plan, words",
    [
        (
            PromptSet(shared=40, own=8),
            "leave room for a new token in the context of 48, got 40 and 8",
        ),
        (
            PromptSet(shared=20, own=5, prompts=1),
            "prompts must be >= 2 (a new one and one with a known prefix), got 1",
        ),
    ],
    ids=str,
)
def test_prompts_that_do_not_fit_are_refused(plan, words):
    lm = tiny_lm()
    with pytest.raises(MinitxError) as caught:
        first_token(lm, lm, "", plan, bar=False)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert first_token(lm, lm, "", PromptSet(40, 7, 2, 1), bar=False).new.multiply_adds == 1


def test_first_token_prints_a_table_or_json(monkeypatch, capsys):
    def load(name, tokenizer=None, dtype=np.float32, **wanted):
        return module.apply(tiny_lm(), wanted)

    monkeypatch.setattr(minitx, "load", load)
    few = ["--shared", "20", "--own", "5", "--prompts", "2", "--rounds", "1"]
    assert main(["first-token", "--prefix-cache", "block=4", *few]) == 0
    assert capsys.readouterr().out.startswith("--prefix-cache block=4: time to first token")
    assert main(["first-token", "--prefix-cache", "block=4", *few, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["known"]["events"]["prompt tokens reused"] == 20
    assert found["plan"] == {"shared": 20, "own": 5, "prompts": 2, "rounds": 1}
    assert main(["first-token", "--shared", "400"]) != 0 and "room" in capsys.readouterr().err
