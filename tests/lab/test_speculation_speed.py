"""``python -m minitx.lab.speculation_speed``: a draft whose acceptance rate is set."""

import json

import pytest
from tiny import tiny_lm

from minitx.config import Config
from minitx.decode import Sampler, new_state
from minitx.errors import MinitxError
from minitx.lab import speculation_speed
from minitx.lab.speculation_speed import Plan, Scripted, alpha_for, gains, measure, shape_of
from minitx.ledger import counting
from minitx.shared.draft_and_verify import Speculative
from minitx.shared.draft_length import FixedLength

CONFIG = Config(
    family="llama", vocab_size=300, width=16, layers=2, heads=2, kv_heads=2, head_width=8,
    hidden=24, context=64, rope_width=8, tied=True,
)  # fmt: skip


def test_alpha_for_one_proposal_is_the_acceptance_itself():
    """gamma = 1: alpha = 0.75. gamma = 2: (alpha + alpha^2) / 2 = 0.75 at alpha = 0.823."""
    assert alpha_for(0.75, 1) == pytest.approx(0.75)
    assert alpha_for(0.75, 2) == pytest.approx((7**0.5 - 1) / 2)
    assert alpha_for(1.0, 4) == pytest.approx(1.0) and alpha_for(0.0, 4) < 1e-9


@pytest.mark.parametrize("alpha, passes", ((1.0, 4), (0.0, 20)))
def test_scripted_draft_is_accepted_always_or_never(alpha, passes):
    """20 tokens with gamma = 4: 4 passes of 5 tokens, or one token a pass."""
    lm, prompt = tiny_lm(), [1, 2, 3]
    text = (*prompt, *lm.decode(lm.model, new_state(lm.model, prompt), prompt, Sampler(), 20))
    loop = Speculative(Scripted(text, alpha, None), FixedLength(4))
    with counting(lm) as counts:
        found = list(loop(lm.model, new_state(lm.model, prompt), prompt, Sampler(), 20))
    assert found == list(text[3:]), "the target's own text"
    assert counts.events["target passes"] == passes
    assert counts.events["draft tokens accepted"] == 20 - passes


@pytest.mark.parametrize("draft", (None, (32, 1)))
def test_gain_reports_the_acceptance_that_was_asked_for(draft):
    """Of 12 or so rounds: about as many as asked for."""
    found = measure(CONFIG, Plan(0.75, 4, draft, prompt=4, new=60, rounds=1), lambda: None)
    assert 0.55 < found.accepted < 0.95
    assert found.tokens_per_pass == pytest.approx(1 + 4 * found.accepted, rel=0.1)
    assert len(found.plain) == len(found.speculative) == 1 and found.speedup["median"] > 0


def test_gain_refuses_a_text_beyond_the_context():
    with pytest.raises(MinitxError, match="at most the context of 64; got 20 and 100"):
        gains([CONFIG], bar=False)


def test_shape_of_a_draft():
    assert shape_of("64x2") == (64, 2) and shape_of(None) is None
    for text in ("64", "0x2", "64x0", "33x2", "ax2", "64x2x2", "-64x2", "1e2x2"):
        with pytest.raises(MinitxError, match="draft must be width x layers"):
            shape_of(text)


def test_command_prints_a_row_for_each_shape(capsys, monkeypatch):
    monkeypatch.setattr(speculation_speed, "one_thread", lambda: True)
    words = ["64x5", "--new", "10", "--rounds", "1", "--gamma", "2"]
    speculation_speed.main(words)
    assert "64 x 5, 512" in capsys.readouterr().out
    speculation_speed.main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["gamma"] == 2 and found["shapes"][0]["tokens_per_pass"] > 1
    for bad in (["--acceptance", "nan"], ["--gamma", "0"], ["nothing"]):
        with pytest.raises(SystemExit):
            speculation_speed.main(bad)
