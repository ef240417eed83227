"""``python -m minitx.lab.ensemble_loss``: an ensemble read with teacher forcing."""

import numpy as np
import pytest
from tiny import decode

import minitx
from minitx.decode import Sampler
from minitx.lab.ensemble_loss import main, numbers, reports
from minitx.lab.evaluate import evaluate_model
from minitx.skip.ensemble import Ensemble, ProbabilityAverage


@pytest.fixture(scope="module")
def pair():
    return minitx.load("stories-draft"), minitx.load("stories-skipless")


def test_one_hot_weights_report_what_each_model_does_alone(pair):
    found = reports(*pair, (0.0, 1.0), "logit", 4)
    for weight, lm in enumerate(pair):
        alone = evaluate_model(lm, 4)
        assert found[weight].loss == pytest.approx(alone.loss, abs=1e-5)
        assert found[weight].by_hops == alone.by_hops


def test_mixture_loses_no_more_than_a_model_drawn_at_random_for_each_token(pair):
    """-ln is convex: Jensen's inequality."""
    found = reports(*pair, (0.0, 0.5, 1.0), "probability", 4)
    assert found[0.5].loss < (found[0.0].loss + found[1.0].loss) / 2


def test_reading_predicts_what_the_loop_writes(pair):
    lm, member = pair
    average = ProbabilityAverage(0.5)
    ids = lm.encode("Once there was a kind girl named Eva.")
    text = list(decode(Ensemble(member.model, average), lm.model, ids, Sampler(), 8))
    whole = [*ids, *text]
    read = average(lm.logits(whole), member.logits(whole))
    np.testing.assert_array_equal(read[len(ids) - 1 : -1].argmax(-1), text)


def test_command_prints_a_row_for_each_weight(capsys):
    main(["stories-skipless", "-m", "stories-draft", "--stories", "2", "--weights", "0,0.5"])
    found = capsys.readouterr().out
    assert "\n0 " in found and "\n0.5 " in found and "x the multiply-adds" in found
    assert "a random one" in found


@pytest.mark.parametrize("text", ["", "2", "a", "0.1,,1"])
def test_bad_weights_are_refused(text):
    with pytest.raises(minitx.errors.MinitxError, match="--weights takes numbers"):
        numbers(text)
