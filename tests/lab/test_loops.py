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
    assert row[:9] == [
        "plain", "100.0 %", "2/2", "+0.000", "-", "1.00 model", "1.000x", "1.000x", "1.000x"
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


def test_accepted_is_the_share_of_the_proposed_tokens():
    lm = tiny_lm()
    run = continue_all(apply(lm, {"speculative": {"draft": "self", "gamma": 2}}), lm, PROMPTS)
    accepted, proposed = (run.events[f"draft tokens {name}"] for name in ("accepted", "proposed"))
    assert proposed and run.accepted == accepted / proposed


def test_sampling_has_a_seed_for_each_prompt_and_ends_at_the_limit():
    lm = tiny_lm()
    one, again = (continue_all(lm, lm, PROMPTS[:1] * 2, 1.0, 9) for _ in range(2))
    assert one.texts == again.texts, "the seed does not decide"
    assert one.texts[0] != one.texts[1], "both prompts had the same seed"
    assert [len(text) for text in one.texts] == [9, 9]
    # jacobi draws with the random numbers of plain decoding
    jacobi = continue_all(apply(lm, {"jacobi": True}), lm, PROMPTS[:1] * 2, 1.0, 9)
    assert jacobi.texts == one.texts


def test_command_prints_a_row_for_each_setting(capsys):
    main(["big_little", "rollback=0.69,5", "small=self", "--prompts", "1", "-m", "stories-draft"])
    found = capsys.readouterr().out
    assert re.search(r"^plain +100.0 % +1/1", found, re.MULTILINE), found
    assert re.search(r"^rollback=0.69 small=self\s+100.0 % ", found, re.MULTILINE), found
    assert len(re.findall(r"model, \d.\d\d small ", found)) == 2
    assert re.search(r"^rollback=5.0 small=self: \d+ big model passes, ", found, re.MULTILINE)


def test_command_refuses_what_is_unknown(capsys):
    with pytest.raises(SystemExit):
        main(["no_such_thing"])
    with pytest.raises(SystemExit):
        main(["speculative", "--temperature", "-1"])
    with pytest.raises(SystemExit):
        main(["jacobi", "guesses=1", "--prompts", "0"])
    assert "--prompts: expected a number from 1" in capsys.readouterr().err
    assert minitx
