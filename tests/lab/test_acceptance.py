"""``python -m minitx.lab.acceptance``: rounds by hand, and against the decoding loop itself."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import tiny_folder, tiny_lm, tiny_model

import minitx
from minitx.lab.acceptance import acceptance, main, read, rounds, summary
from minitx.ledger import counting
from minitx.shared.draft_and_verify import Speculative
from minitx.shared.draft_length import FixedLength
from minitx.skip.speculative import DraftModel


def test_rounds_by_hand():
    # Tokens that would be accepted, rejected, accepted. Round 1 proposes two (gamma), the first is
    # accepted, the target replaces the second. Round 2 has one token left, the target's own.
    assert rounds([1, 0, 1], gamma=2) == (2, 2, 1)
    assert rounds([1, 1, 1], gamma=2) == (1, 2, 2), "two accepted and the target's own"
    assert rounds([0, 0, 0], gamma=2) == (3, 3, 0), "2 + 1 + 0 proposed: the text ends"
    # Accepted with probability 1/2: round 1 proposes one; it is accepted in half of the cases,
    # which ends the text, else round 2 has one token left.
    assert rounds([0.5, 0.5], gamma=1) == (1.5, 1, 0.5)


def test_rounds_of_a_long_text_have_the_length_of_the_paper():
    """(1 - alpha^(gamma+1)) / (1 - alpha) tokens, if each is accepted with probability alpha."""
    alpha, gamma = 0.8, 4
    passes, proposed, accepted = rounds(np.full(4000, alpha), gamma)
    assert accepted + passes == pytest.approx(4000)
    assert 4000 / passes == pytest.approx((1 - alpha**5) / (1 - alpha), rel=2e-3)
    assert proposed / passes == pytest.approx(gamma, rel=2e-3)


def test_greedy_rounds_are_those_of_the_decoding_loop():
    target = tiny_lm()
    other = replace(target.model, norm=tiny_model(seed=2).norm)  # often the same argmax
    draft = replace(target, model=other)
    lm = replace(target, decode=Speculative(DraftModel(other), FixedLength(3)))
    rows, counts = [], []
    for prompt in ([258, 5, 9], [258, 70], [258, 200, 33, 12]):
        with counting(lm) as ledger:
            text = list(lm.tokens(prompt, 30))
        if text and text[-1] not in lm.model.config.eos and len(text) == 30:
            events = "target passes", "draft tokens proposed", "draft tokens accepted"
            counts.append(tuple(ledger.events[event] for event in events))
            rows.append(read(target, draft, [*prompt, *text], len(prompt), 0))
    assert rows, "no text without an end"
    for row, counted in zip(rows, counts):
        assert rounds(row[1], 3) == counted
    assert 0 < summary(rows, 0, 3).share < 1


def test_acceptance_per_token_is_the_overlap():
    target, draft = tiny_lm(), tiny_lm(model=tiny_model(seed=2))
    ids = [258, 5, 9, 30, 7]
    overlap, given, ahead = read(target, draft, ids, 3, 1)
    p, q = (np.exp(lm.logits(ids[:-1])[2:].astype(float)) for lm in (target, draft))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    np.testing.assert_allclose(overlap, np.minimum(p, q).sum(-1), rtol=1e-5)
    at = [0, 1], [30, 7]
    np.testing.assert_allclose(given, np.minimum(1, q[at] / p[at]), rtol=1e-4)
    best = np.sort(p, -1)
    np.testing.assert_allclose(ahead, best[:, -1] - best[:, -2], rtol=1e-3, atol=1e-9)


def test_model_as_its_own_draft_is_always_accepted():
    lm = tiny_lm()
    report = acceptance(lm, lm, stories=2, prompt=5, tokens=12, gamma=3)
    assert [a.share for a in report.found] == pytest.approx([1, 1])
    assert report.found[0].near_ties is None, "nothing is rejected"


def test_shipped_draft_is_accepted_on_held_out_stories():
    """On 10 stories; weights/stories-draft/README.md has the figures of 200."""
    target, draft = minitx.load("stories"), minitx.load("stories-draft")
    greedy, sampled = acceptance(target, draft, stories=10).found
    assert 0.75 < greedy.share < 0.86 and 0.88 < greedy.per_token < 0.94
    assert 0.78 < sampled.share < 0.9 and 0.9 < sampled.per_token < 0.95


def test_command_prints_both_temperatures(tmp_path, capsys):
    folder = tiny_folder(tmp_path / "a")
    main([str(folder), str(folder), *"--stories 2 --prompt 5 --tokens 6".split()])
    text = capsys.readouterr().out
    words = [
        line.split() for line in text.splitlines()
    ]  # 6 tokens: 4 + 1 in the first round, then 1
    assert ["greedy", *"100.0 % 100.0 % 3.00".split()] in words
    assert ["1", *"100.0 % 100.0 % 3.00".split()] in words
    assert "2 held-out stories, the first 5 tokens" in text


def test_bad_arguments_are_one_sentence(tmp_path, capsys):
    folder = str(tiny_folder(tmp_path / "a"))
    for words, expected in (
        ([folder, "stories-draft"], "has 1022 tokens and this model 259"),
        ([folder, folder, "--gamma", "0"], "gamma"),
        ([folder, "nothing-here"], "acceptance cannot load its draft"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert expected in capsys.readouterr().err
