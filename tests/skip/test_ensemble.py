"""Ensembles: the two averages, one loop with two KV caches, and where they help and hurt."""

import literal_ensemble as literal
import numpy as np
import pytest
from enumeration import exact_distribution, total_variation
from markov import noisy, random_markov
from same import assert_same
from tiny import FAMILIES, check_close, decode, tiny_folder, tiny_lm, tiny_model

import minitx
from minitx import ledger
from minitx.decode import Sampler
from minitx.errors import MinitxError
from minitx.lab.ensemble_loss import reports
from minitx.lm import LM
from minitx.skip.ensemble import AVERAGES, Ensemble, LogitAverage, ProbabilityAverage
from minitx.technique import apply

PROMPT = [5, 1, 2, 3, 9, 8, 1, 2, 3]

# The worked example ------------------------------------------------------------------------------
#
#                    token 0   token 1   token 2
#     one model       .9        .05       .05
#     the other       .001      .6        .399
#     mixture         .4505     .325      .2245     half of the sum: token 0, likely for one of them
#     geometric mean  .0300     .1732     .1412     roots of the products; divided by their sum:
#                     .0871     .5028     .4101     token 1, which neither thinks impossible

P, Q = np.array([0.9, 0.05, 0.05]), np.array([0.001, 0.6, 0.399])


def test_worked_example():
    mixture = np.exp(ProbabilityAverage(0.5)(np.log(P), np.log(Q)))
    assert_same(mixture, [0.4505, 0.325, 0.2245], tolerance=1e-7)
    product = np.exp(LogitAverage(0.5)(np.log(P), np.log(Q)))
    assert_same(product, [0.0871, 0.5028, 0.4101], atol=1e-4)


def test_constant_added_to_one_models_logits_changes_nothing():
    for make in AVERAGES.values():
        found, expected = make(0.3)(np.log(P) + 100, np.log(Q)), make(0.3)(np.log(P), np.log(Q))
        assert_same(found, expected, atol=1e-12)


def test_model_with_larger_logits_dominates_the_logit_average():
    found = np.exp(LogitAverage(0.5)(np.log(P), 3 * np.log(Q)))
    assert_same(found, [0.0002, 0.6483, 0.3515], atol=1e-4)


def test_token_that_one_model_excludes_stays_in_the_mixture_alone():
    with np.errstate(divide="ignore"):
        sure = np.log([1.0, 0.0, 0.0])
    mixture = np.exp(ProbabilityAverage(0.5)(sure, np.log(Q)))
    assert_same(mixture, [0.5005, 0.3, 0.1995], tolerance=1e-7)
    assert_same(np.exp(LogitAverage(0.5)(sure, np.log(Q))), [1, 0, 0], tolerance=1e-7)
    assert_same(np.exp(LogitAverage(1)(sure, np.log(Q))), Q, tolerance=1e-7)  # 0^0 is 1


@pytest.mark.parametrize("average", AVERAGES)
def test_average_equals_the_literal_version(average):
    rng = np.random.default_rng(0)
    rule = getattr(literal, f"{average}_average")
    for weight in (0, 0.1, 0.5, 0.9, 1):
        p, q = rng.dirichlet(np.ones(7)), rng.dirichlet(np.ones(7))
        found = np.exp(AVERAGES[average](weight)(np.log(p), np.log(q)))
        assert_same(found, rule([*p], [*q], weight), atol=1e-12)


@pytest.mark.parametrize("average", AVERAGES)
def test_greedy_text_equals_the_literal_version(average):
    one = random_markov(8, 1)
    other = noisy(one, 2, 1.5)
    rule = getattr(literal, f"{average}_average")
    loop = Ensemble(other, AVERAGES[average](0.4))
    for start in range(8):
        found = list(decode(loop, one, [start, 3], Sampler(), 20))
        expected = literal.greedy(
            lambda t: [*one.after(t)], lambda t: [*other.after(t)], rule, 0.4, [start, 3], 20
        )
        assert found == expected


# Exact where it has to be ------------------------------------------------------------------------


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_hot_weights_and_identical_models_reproduce_a_model(average, family):
    one, other = (tiny_model(family, seed=s, dtype=np.float64) for s in (1, 2))
    ours, theirs = one(PROMPT), other(PROMPT)

    def probabilities(logits):
        return np.exp(ProbabilityAverage(0.0)(logits, logits))

    for weight, a, b, expected in (
        (0.0, ours, theirs, ours),
        (1.0, ours, theirs, theirs),
        (0.3, ours, ours, ours),
    ):
        found = np.exp(AVERAGES[average](weight)(a, b))
        check_close(found, probabilities(expected), 1e-12, f"weight {weight}")


def test_weight_1_writes_what_the_other_model_does():
    lm, other = (LM(tiny_model(seed=s, dtype=np.float64)) for s in (1, 2))
    loop = Ensemble(other.model, ProbabilityAverage(1.0))
    found = list(decode(loop, lm.model, PROMPT, Sampler(), 25))
    assert found == list(decode(other.decode, other.model, PROMPT, Sampler(), 25))


def test_each_model_reads_every_token_once():
    one, other = random_markov(5, 1), random_markov(5, 2)
    found = list(decode(Ensemble(other, LogitAverage(0.5)), one, [1, 2, 3], Sampler(), 4))
    assert one.passes == other.passes == [[1, 2, 3], *([token] for token in found[:3])]


def test_samples_follow_the_mixture():
    """Two tokens, by enumeration: the next one is drawn from the mixture of both models' own."""
    one, other = random_markov(3, 1), random_markov(3, 2)
    loop = Ensemble(other, ProbabilityAverage(0.25))
    found = exact_distribution(lambda s: tuple(decode(loop, one, [0, 1], s, 2)))
    expected = {}
    mixed = 0.75 * one.w + 0.25 * other.w
    for a in range(3):
        for b in range(3):
            expected[a, b] = mixed[0, 1, a] * mixed[1, a, b]
    assert total_variation(found, expected) < 1e-12


# Options, cost -----------------------------------------------------------------------------------


def test_member_with_a_shorter_context_is_refused(tmp_path):
    from minitx.checkpoints.huggingface import write_model

    write_model(tiny_model(context=20), tmp_path, "F32")
    with pytest.raises(MinitxError, match="context of its member is 20 tokens and this model's is"):
        apply(tiny_lm(), {"ensemble": {"member": str(tmp_path)}})


def test_member_may_be_a_folder_and_the_model_itself_changes_nothing(tmp_path):
    tiny_folder(tmp_path / "toy")
    changed = apply(tiny_lm(), {"ensemble": {"member": str(tmp_path / "toy")}})
    assert changed.generate(PROMPT, 20) == tiny_lm().generate(PROMPT, 20)
    assert repr(changed.decode).startswith("Ensemble\n  member: Transformer")


def test_work_is_that_of_both_models():
    lm = tiny_lm()
    changed = apply(lm, {"ensemble": {"member": "self"}})
    with ledger.counting(changed) as counts:
        assert len(list(decode(changed.decode, lm.model, PROMPT, Sampler(), 10))) == 10
    ours, theirs = (counts.total(path).multiply_adds for path in ("model", "decode.member"))
    with ledger.counting(lm) as alone:
        list(decode(lm.decode, lm.model, PROMPT, Sampler(), 10))
    assert ours == alone.total().multiply_adds and theirs > 0
    assert counts.total().multiply_adds == ours + theirs


# Stories -----------------------------------------------------------------------------------------


def test_two_as_good_models_help_each_other_and_a_weak_one_hurts():
    """Loss above that of the better model alone, in nats per token, on six stories."""
    parallel, relu, draft, stories = (
        minitx.load(name)
        for name in ("stories-parallel", "stories-relu", "stories-draft", "stories")
    )

    def gain(lm, member):
        found = reports(lm, member, (0.0, 0.5, 1.0), "probability", 6)
        return found[0.5].loss - min(found[0.0].loss, found[1.0].loss)

    assert -0.02 < gain(relu, parallel) < 0, "the mixture of equals is better than both"
    assert 0.002 < gain(stories, draft) < 0.05, "a weaker member costs"
