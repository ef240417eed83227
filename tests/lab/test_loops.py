"""``python -m minitx.lab.loops``: what a decoding loop costs, beside plain decoding."""

import re

import numpy as np
import pytest
from tiny import tiny_lm

import minitx
from minitx.lab.loops import continue_all, likelihood, main, row_of
from minitx.ledger import counting
from minitx.technique import apply

PROMPTS = [[5, 1, 2, 3], [9, 8, 1, 2, 3]]


def test_plain_decoding_beside_itself_has_one_call_a_token():
    lm = tiny_lm()
    plain = continue_all(lm, lm, PROMPTS)
    assert plain.texts == [lm.generate(p) for p in PROMPTS] or plain.tokens == 44 + 43
    assert plain.calls == {"model": plain.tokens}
    row = row_of("plain", plain, plain)
    assert row[:7] == [
        "plain", "100.0 %", "2 of 2", "+0.000", "1.00 model", "1.000x", "1.000x"
    ]  # fmt: skip


def test_likelihood_sums_the_log_probabilities_of_the_new_tokens():
    lm = tiny_lm(dtype=np.float64)
    found = likelihood(lm, [5, 1, 2], [7, 9])
    expected = 0.0
    for ids, token in (([5, 1, 2], 7), ([5, 1, 2, 7], 9)):
        z = lm.logits(ids)[-1]
        expected -= z[token] - np.log(np.exp(z).sum())
    assert found == pytest.approx(expected)


def test_calls_and_work_of_both_models_are_counted():
    lm = tiny_lm()
    plain = continue_all(lm, lm, PROMPTS)
    changed = apply(lm, {"speculative": {"draft": "self", "gamma": 2}})
    run = continue_all(changed, lm, PROMPTS)
    assert run.same_tokens(plain) == 1 and run.same_texts(plain) == 2
    # one call more for each prefill
    assert run.calls["model"] == run.events["target passes"] + len(PROMPTS)
    assert run.calls["decode.draft.model"] == run.events["draft tokens proposed"]
    with counting(changed) as counts:
        for prompt, text in zip(PROMPTS, run.texts):
            list(changed.tokens(prompt, len(text)))
    assert run.work.multiply_adds <= 2 * counts.total().multiply_adds


def test_command_prints_a_row_for_each_setting(capsys):
    main(["big_little", "rollback=0.69,5", "small=self", "--prompts", "1", "-m", "stories-draft"])
    found = capsys.readouterr().out
    assert re.search(r"^plain +100.0 % +1 of 1", found, re.MULTILINE), found
    assert re.search(r"^rollback=0.69 small=self\s+100.0 % ", found, re.MULTILINE), found
    assert found.count("decode.small") == 2


def test_command_refuses_what_is_unknown(capsys):
    with pytest.raises(SystemExit):
        main(["no_such_thing"])
    with pytest.raises(SystemExit):
        main(["jacobi", "guesses=1", "--prompts", "0"])
    assert "--prompts: expected a number from 1" in capsys.readouterr().err
    assert minitx
