"""contextual_sparsity: an example by hand, the literal version, the predictors' gradient and
training, counts, the file, the command, and figures on stories-relu."""

import shutil
from dataclasses import replace
from functools import cache

import literal_contextual_sparsity as literal
import numpy as np
import pytest
from random_sets import broken_law, large_matrices
from same import assert_same
from tiny import TOKENIZER, check_close, in_chunks, tiny_folder, tiny_model

import minitx
from minitx import cli
from minitx.checkpoints.common import arrays_fingerprint
from minitx.checkpoints.find import shipped
from minitx.checkpoints.safetensors import read_header, read_tensors
from minitx.checkpoints.safetensors_write import write_safetensors
from minitx.errors import MinitxError
from minitx.lab.evaluate import Tally
from minitx.lab.reading import add_up, stories_to_read
from minitx.ledger import counting
from minitx.lm import LM
from minitx.memory_layout import to_column_major
from minitx.model import NoNorm
from minitx.skip.contextual_sparsity import FFNByNeuron, PredictedNeurons, predicted, train
from minitx.skip.contextual_sparsity.file import FILE, read_predictors, write_predictors
from minitx.skip.contextual_sparsity.fit import (
    AdamW,
    Hyperparameters,
    Training,
    gradients,
    learn,
    longest_half,
    loss,
    record,
    train_on_loading,
)
from minitx.skip.contextual_sparsity.predictor import Above, Predictor, RandomK, TopK
from minitx.state import Layer
from minitx.technique import apply, blocks_of, find

IDS = np.random.default_rng(5).integers(0, 258, 24)
# Of both orders of a block, with grouped heads and RoPE, and what has biases everywhere.
KINDS = {
    "gpt2": ("gpt2", dict(heads=4, kv_heads=2, width=24, head_width=6)),
    "parallel": ("gpt_neox", dict(activation="relu", heads=4, kv_heads=4, head_width=4)),
}
kind = pytest.mark.parametrize("kind", KINDS)


@cache
def dense_lm(kind="gpt2", dtype=np.float64) -> LM:
    family, changes = KINDS[kind]
    return LM(tiny_model(family, dtype=dtype, **changes), TOKENIZER)


def random_predictors(lm, units: int, rank=3, seed=0) -> list[Predictor]:
    rng, D = np.random.default_rng(seed), lm.model.config.width
    shapes = (D, rank), (rank, units)
    return [Predictor(*(rng.standard_normal(s) for s in shapes)) for _ in blocks_of(lm)]


def selectors(lm, neurons=9, heads=2, seed=0) -> dict[str, list]:
    """Random predictors' top-k, which differ from token to token."""
    c = lm.model.config
    return {
        "ffn": [TopK(p, neurons) for p in random_predictors(lm, c.hidden, seed=seed)],
        "attn": [TopK(p, heads) for p in random_predictors(lm, c.heads, seed=seed + 1)],
    }


# Worked example ----------------------------------------------------------------------------------


def test_neurons_by_hand():
    """D = 2, F = 3, rank 1. n = (1, 2): n A = 1 * 1 + 2 * 1 = 3.

    z = 3 * (1, -1, 0.5) = (3, -3, 1.5)
    threshold 0 runs neurons 0 and 2; threshold 2 runs 0; top-1 runs 0.
    neuron 0: h = 1 * 1 + 2 * 0 + 0 = 1;    row of W_down (1, 0)
    neuron 1: h = 1 * 0 + 2 * 1 + 0 = 2;    row of W_down (0, 1)    active, but not predicted
    neuron 2: h = -1 - 2 + 1 = -2, so 0;    row of W_down (5, 5)    predicted, but not active
    FFN over 0 and 2 = 1 (1, 0) + 0 (5, 5) + b_down (0.5, 0.5) = (1.5, 0.5); dense: (1.5, 2.5)
    """
    predictor = Predictor(np.array([[1.0], [1.0]]), np.array([[1.0, -1.0, 0.5]]))
    w1 = np.array([[1.0, 0], [0, 1], [-1, -1]])  # a neuron in each row
    w2, b1, b2 = np.array([[1.0, 0], [0, 1], [5, 5]]), np.array([0.0, 0, 1]), np.full(2, 0.5)
    x, layer = np.array([[1.0, 2.0]]), Layer.once(1)
    assert_same(predictor(x), [[3, -3, 1.5]], tolerance=1e-7)
    for selector, runs in (
        (Above(predictor, 0.0), [True, False, True]),
        (Above(predictor, 2.0), [True, False, False]),
        (TopK(predictor, 1), [True, False, False]),
        (TopK(predictor, 2), [True, False, True]),
    ):
        assert selector(x, layer).tolist() == [runs]
    parts = NoNorm(), w1, b1, w2, b2
    assert_same(FFNByNeuron(*parts)(x, layer), [[1.5, 2.5]], tolerance=1e-7)
    some = PredictedNeurons(*parts, selector=Above(predictor, 0.0))
    with counting(some) as counts:
        assert_same(some(x, layer), [[1.5, 0.5]], tolerance=1e-7)
    assert counts.events == {"neurons": 3, "neurons run": 2, "active neurons run": 1}
    maps = [a.tolist() for a in (w1.T, b1, w2, b2)]
    assert literal.ffn([1.0, 2.0], *maps, [0, 2]) == [1.5, 0.5]


def test_heads_that_write_most_by_hand():
    """ctx = 1, 2 and 3 for heads of width 1; W_o,h = (3, 4), (1, 0), (1, 1): lengths 5, 2 and 4.2.
    The longer half of three, rounded up, is two: heads 0 and 2."""
    w_o = np.array([[[3.0, 4]], [[1, 0]], [[1, 1]]])
    ctx = np.array([[1.0, 2, 3]])
    assert longest_half(ctx, w_o).tolist() == [[True, False, True]]
    assert literal.longest_half([[1], [2], [3]], w_o.tolist()) == [0, 2]


def test_ties_go_to_the_lower_index_even_if_rounding_differs():
    predictor = Predictor(np.ones((1, 1)), np.array([[1.0, 2.0, 2.0 + 1e-15]]))
    assert TopK(predictor, 1)(np.ones((1, 1)), None).tolist() == [[False, True, False]]


# The literal version -----------------------------------------------------------------------------


@kind
@pytest.mark.parametrize("neurons, heads", [(9, 2), (24, 1), (1, 4)])
def test_logits_equal_the_literal_version(kind, neurons, heads):
    lm = dense_lm(kind)
    chosen, ran = selectors(lm, neurons, heads), set()

    def of(slot, count):
        def select(layer, n):
            p = chosen[slot][layer].predictor
            found = literal.top(literal.scores(n, p.a.tolist(), p.b.tolist()), count)
            ran.add((slot, tuple(found)))
            return found

        return select

    expected = literal.run(lm.model, IDS[:12], of("ffn", neurons), of("attn", heads))
    found = predicted(lm, chosen)
    check_close(found.logits(IDS[:12]), expected, 1e-10, "all tokens at once")
    check_close(in_chunks(found, IDS[:12], (5, *[1] * 7)), expected, 1e-10, "step by step")
    if neurons < 24 and heads < 4:
        assert len(ran) > 10, "every token runs the same: nothing to check"


@kind
def test_predictors_keep_the_laws_of_the_contract(kind):
    """Padded batches, rewinding and chunks, with scores that differ from token to token; and with
    column-major matrices."""
    lm = dense_lm(kind)
    above = [Above(p, 0.5) for p in random_predictors(lm, lm.model.config.hidden)]
    found = predicted(lm, selectors(lm) | ({"ffn": above} if kind == "gpt2" else {}))
    with large_matrices(kind == "parallel"):
        assert broken_law(to_column_major(found), IDS[:20], prompt=8, new=4) == ""


def test_batch_without_cache_equals_its_rows():
    lm = dense_lm()
    lm = predicted(lm, selectors(lm))
    rows = np.stack([IDS, IDS[::-1], (IDS * 7) % 258])
    for row, found in zip(rows, lm.logits(rows)):
        check_close(found, lm.logits(row), 1e-10, "a row of the batch")


@kind
def test_all_neurons_and_heads_selected_equals_dense(kind):
    lm = dense_lm(kind)
    check_close(predicted(lm, selectors(lm, 24, 4)).logits(IDS), lm.logits(IDS), 1e-12, "all run")
    none = [Above(p, 100.0) for p in random_predictors(lm, 24)]
    without = replace(lm.model, stack=without_neurons(lm.model.stack))
    check_close(
        predicted(lm, {"ffn": none}).logits(IDS), without(IDS), 1e-12, "no neuron runs: only b_2"
    )


def without_neurons(stack):
    def change(block):
        down = replace(block.ffn.down, w=np.zeros_like(block.ffn.down.w))
        return replace(block, ffn=replace(block.ffn, down=down))

    return replace(stack, blocks=tuple(map(change, stack.blocks)))


# Work --------------------------------------------------------------------------------------------


@kind
def test_counted_work_equals_the_formula_on_the_card(kind):
    """A token after S - 1 others, with n of F neurons and r of H heads: 2 D (F - n) and
    (H - r) (2 D d + 2 S d) less, the predictors' rank (D + F) + rank (D + H) more."""
    dense = dense_lm(kind)
    c, rank = dense.model.config, 3
    for neurons, heads in ((9, 2), (1, 1), (24, 4)):
        lm = predicted(dense, selectors(dense, neurons, heads))
        for S in (5, 20):
            work = []
            for found in (dense, lm):
                state = found.model.new_state()
                found.model(IDS[: S - 1], state)
                with counting(found) as counts:
                    found.model(IDS[S - 1 : S], state)
                work.append(counts.total().multiply_adds)
            D, d, F, H = c.width, c.head_width, c.hidden, c.heads
            saved = 2 * D * (F - neurons) + (H - heads) * (2 * D * d + 2 * S * d)
            own = rank * (D + F) + rank * (D + H)
            assert work[0] - work[1] == c.layers * (saved - own), (neurons, heads, S)
            events = counts.events
            assert events["neurons run"] == c.layers * neurons
            assert (events["heads run"], events["heads"]) == (c.layers * heads, c.layers * H)
            assert 0 <= events["active neurons run"] <= events["neurons run"]


def test_prompt_runs_each_token_with_its_own_neurons():
    lm = dense_lm()
    one = predicted(lm, selectors(lm, 3))
    with counting(one) as counts:
        one.logits(IDS)
    D, T, rank, F = 24, len(IDS), 3, 24
    work = counts.total("model.stack.blocks.0.ffn").multiply_adds
    assert work == T * (2 * D * 3 + rank * (D + F)), "the union of the tokens' neurons was run"


# Training ----------------------------------------------------------------------------------------


def examples(rng, n=40, D=5, units=7):
    x = rng.standard_normal((n, D))
    return x, x @ rng.standard_normal((D, units)) > 0.7


def test_gradients_equal_finite_differences_and_the_literal_loss():
    rng = np.random.default_rng(0)
    x, y = examples(rng)
    a, b = rng.standard_normal((5, 2)), rng.standard_normal((2, 7))
    arrays = [array.tolist() for array in (a, b, x, y)]
    assert loss(a, b, x, y, 0.3) == pytest.approx(literal.loss(*arrays, 0.3))
    found = gradients(a, b, x, y, 0.3)
    for w, gradient in zip((a, b), found):
        for at in np.ndindex(w.shape):
            before = w[at]
            w[at] = before + 1e-5
            high = loss(a, b, x, y, 0.3)
            w[at] = before - 1e-5
            low, w[at] = loss(a, b, x, y, 0.3), before
            assert gradient[at] == pytest.approx((high - low) / 2e-5, abs=1e-8), at


def test_first_step_of_adamw_by_hand():
    """The first direction is g / |g|: 1 (rate) * (sign + 0.5 (decay) w). Of two steps, the second
    has half the rate."""
    hyper = Hyperparameters(rate=1.0, decay=0.5)
    optimizer = AdamW([np.array([2.0, -4.0])], hyper, steps=2)
    (w,) = optimizer.step([np.array([2.0, -4.0])], [np.array([0.1, 7.0])])
    assert_same(w, [2 - (1 + 1), -4 - (1 - 2)], atol=1e-6)
    (w,) = optimizer.step([w], [np.array([0.1, 7.0])])
    assert_same(w, [0 - 0.5, -3 - 0.5 * (1 - 1.5)], atol=1e-6)


def test_training_finds_a_map_of_low_rank():
    """Two of five features decide: rank 2 is enough, rank 0 (chance) is far off."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((600, 5))
    y = x @ rng.standard_normal((5, 2)) @ rng.standard_normal((2, 7)) > 0.5
    p = learn(x, y, 2, Hyperparameters(epochs=30, batch=100, rate=0.05), rng)
    again = learn(
        x, y, 2, Hyperparameters(epochs=30, batch=100, rate=0.05), np.random.default_rng(1)
    )
    assert again.a.shape == (5, 2) and again.b.shape == (2, 7)
    run = Above(p, 0.0)(x, None)
    assert (run & y).sum() / y.sum() > 0.95, "active units are missed"
    assert run.mean() < y.mean() + 0.25, "recall by always saying active"


def test_examples_are_what_the_sub_layers_read_and_which_units_are_active():
    lm = dense_lm()
    one, two = IDS[:9].tolist(), IDS[9:20].tolist()
    layer, block = Layer.once(9), blocks_of(lm)[0]
    x = lm.model.embed(np.array(one), slice(0, 9))
    n = block.attn.norm(x)
    found, active = record(lm, "attn", [one, two])[0].arrays()
    assert found.shape == (20, 24) and active.shape == (20, 4)
    assert_same(found[:9], n, tolerance=1e-7)
    assert_same(active.sum(-1), 2, "half of the heads")
    x = x + block.attn(x, layer)
    found, active = record(lm, "ffn", [one, two])[0].arrays()
    assert_same(found[:9], block.ffn.norm(x), tolerance=1e-7)
    assert_same(active[:9], block.ffn.expand(block.ffn.norm(x)) > 0)


def test_model_without_a_file_is_trained_when_it_is_loaded_always_the_same():
    few = {"stories": 2, "epochs": 2, "neurons": 0.5, "heads": 0.5}
    one, other = (apply(dense_lm(), {"contextual_sparsity": few | s}) for s in ({}, {"seed": 1}))
    found = train_on_loading(dense_lm(), "ffn", 2, Training(None, Hyperparameters(2)))
    for block, p in zip(blocks_of(one), found):
        used = block.ffn.selector.predictor
        assert_same(used.a, p.a, "not deterministic")
        assert used.a.shape == (24, 6), "a quarter of the width"
        assert block.attn.selector.predictor.a.shape == (24, 1), "a sixteenth"
    assert (one.logits(IDS) != other.logits(IDS)).any(), "the seed makes no difference"


# Options -----------------------------------------------------------------------------------------


def test_random_baseline_runs_as_many_units():
    few = {"neurons": 0.25, "heads": 0.5}
    events = []
    for choose in ("predictor", "random"):
        options = few | {"choose": choose, "stories": 1, "epochs": 1}
        lm = apply(dense_lm(), {"contextual_sparsity": options})
        with counting(lm) as counts:
            lm.logits(IDS)
        events.append({n: counts.events[n] for n in ("neurons", "neurons run", "heads run")})
    assert events[0] == events[1] and 4 * events[0]["neurons run"] == events[0]["neurons"]
    scores = [block.ffn.selector.scores for block in blocks_of(lm)]
    assert (scores[0] != scores[1]).any(), "the same neurons in every layer"
    assert type(blocks_of(lm)[0].attn.selector) is RandomK


def test_monitor_runs_every_nth_token_exactly():
    lm = dense_lm()
    with pytest.raises(MinitxError, match="limit"):
        apply(lm, {"contextual_sparsity": {"limit": -1.0}})
    found = predicted(lm, {"ffn": selectors(lm, 1)["ffn"]}, monitor=4, limit=1e9)
    with counting(found) as counts:
        found.logits(IDS)
    assert counts.events["quality checks"] == 2 * len(IDS) // 4
    strict = predicted(lm, {"ffn": selectors(lm, 1)["ffn"]}, monitor=1, limit=0.0)
    check_close(strict.logits(IDS), lm.logits(IDS), 1e-12, "every token is exact")


REFUSED = [
    ("gpt2", {"neurons": 0.5, "threshold": 0.0}, "got both neurons and threshold; give the share"),
    ("gpt2", {"choose": "random"}, "choose=random runs a share of the neurons; give it as neuro"),
    ("gpt2", {"neurons": 1.0, "monitor": 4}, "with neurons=1 all of them run; leave monitor out"),
    ("llama", {}, "needs FFNs with ReLU, and those of this model have SwiGLU"),
    ("gpt_neox", {"neurons": 0.5}, "needs FFNs with ReLU, and those of this model have gelu"),
]


@pytest.mark.parametrize("family, options, words", REFUSED)
def test_refusals_say_what_to_do(family, options, words):
    with pytest.raises(MinitxError, match=f"contextual_sparsity.*{words}") as caught:
        apply(LM(tiny_model(family), TOKENIZER), {"contextual_sparsity": options})
    assert "\n" not in str(caught.value)


def test_heads_alone_are_predicted_in_a_model_without_relu():
    lm = LM(tiny_model("llama", heads=4, head_width=4, rope_width=4), TOKENIZER)
    few = {"neurons": 1.0, "heads": 0.5, "stories": 1, "epochs": 1}
    lm = apply(lm, {"contextual_sparsity": few})
    assert "PredictedHeads" in repr(lm) and "PredictedNeurons" not in repr(lm)


@pytest.mark.parametrize("other", ["lazy_tokens", "token_prune"])
def test_techniques_that_read_the_weights_of_all_heads_are_refused(other):
    options = find(other).demo
    wanted = {"contextual_sparsity": {"neurons": 1.0, "heads": 0.5, "stories": 1}, other: options}
    with pytest.raises(MinitxError, match=f"{other} .* Attend, which contextual_sparsity has"):
        apply(dense_lm(), wanted)


def test_model_without_tokenizer_is_refused_but_for_the_baseline():
    lm = LM(tiny_model("gpt2"))
    with pytest.raises(MinitxError, match="contextual_sparsity learns from.*choose=random"):
        apply(lm, {"contextual_sparsity": {}})
    apply(lm, {"contextual_sparsity": {"choose": "random", "neurons": 0.5}})


# The file ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A tiny model with a file of predictors."""
    found = tmp_path / "model"
    found.mkdir()
    lm = minitx.load(tiny_folder(found, "gpt2"))
    slots = {"ffn": random_predictors(lm, 24, 2), "attn": random_predictors(lm, 2, 2)}
    write_predictors(lm, slots, found / FILE)
    return found


def predictor_of(lm) -> Predictor:
    return blocks_of(lm)[0].ffn.selector.predictor


def test_written_predictors_are_read_again_in_float16(folder):
    lm = minitx.load(folder, contextual_sparsity={"heads": 0.5})
    written = random_predictors(lm, 24, 2)[0]
    found = predictor_of(lm)
    assert_same(found.b, written.b.astype(np.float16))
    assert found.b.dtype == np.float32
    assert isinstance(blocks_of(lm)[0].ffn.selector, Above)
    assert blocks_of(lm)[0].attn.selector.predictor.b.shape == (2, 2)
    lm = minitx.load(folder, dtype=np.float64, contextual_sparsity=True)
    assert predictor_of(lm).b.dtype == np.float64, "the file is for the model in float32 only"
    assert predictor_of(lm).a.shape == (16, 2)


@pytest.mark.parametrize(
    "others, options",
    [({"fold_norms": True}, {}), ({"prune": {"stories": 1}}, {}), ({}, {"rank": 4})],
    ids=str,
)
def test_predictors_that_do_not_fit_are_trained_on_loading(folder, others, options):
    """After a technique that changed what they read or their weights, and for another rank."""
    few = {"stories": 1, "epochs": 1}
    lm = minitx.load(folder, contextual_sparsity=few | options, **others)
    assert predictor_of(lm).a.shape == (16, 4), "not trained, though the file does not fit"
    assert "contextual_sparsity calibrated on" in str(lm.calibrated[-1])


def changed_file(folder, change=lambda tensors: None, **metadata):
    tensors = {name: w.copy() for name, w in read_tensors(folder / FILE).items()}
    metadata = read_header(folder / FILE).metadata | metadata
    change(tensors)
    write_safetensors(folder / FILE, tensors, "F32", metadata)


def flip_a_bit(tensors):
    tensors["neurons.1.a"].view(np.uint32)[3, 1] ^= 1


@pytest.mark.parametrize(
    "change, metadata, words",
    [
        (flip_a_bit, {}, "do not match their fingerprint, so it was changed after it was written"),
        (lambda t: t.pop("heads.0.b"), {}, "do not match their fingerprint"),
        (lambda t: None, {"weights": "x"}, "trained for other weights than those in .*; delete it"),
        (lambda t: None, {"format": "pt"}, "is not a predictor file; train them with python -m"),
    ],
    ids=["bit", "missing", "weights", "format"],
)
def test_damaged_file_and_one_of_another_model_are_refused(folder, change, metadata, words):
    changed_file(folder, change, **metadata)
    with pytest.raises(MinitxError, match=words) as caught:
        minitx.load(folder, contextual_sparsity=True)
    assert FILE in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"a": (16, 2), "b": (3, 24)}, r"expected neurons.0.a \(D, rank\) and neurons.0.b \(rank"),
        (
            {"a": (16, 2), "b": (2, 23)},
            r"expected predictors from D to units \[\(16, 24\), \(16, 24",
        ),
        ({"a": (16, 2), "b": None}, r"got the shapes \(16, 2\) and \(0,\)"),
        ({"a": (16, 2), "b": (2, 24), "c": (1,)}, "has tensors that are no predictors"),
    ],
    ids=["rank", "units", "missing", "more"],
)
def test_file_whose_fingerprint_is_right_but_not_its_shapes_is_refused(folder, arrays, words):
    tensors = read_tensors(folder / FILE)
    for name, shape in arrays.items():
        tensors.pop(f"neurons.0.{name}", None)
        if shape is not None:
            tensors[f"neurons.0.{name}"] = np.ones(shape, np.float32)
    metadata = read_header(folder / FILE).metadata | {"predictors": arrays_fingerprint(tensors)}
    write_safetensors(folder / FILE, tensors, "F32", metadata)
    with pytest.raises(MinitxError, match=words) as caught:
        minitx.load(folder, contextual_sparsity=True)
    assert FILE in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("number, words", [(np.nan, "NaN or Inf"), (1e9, "expected numbers -1e")])
def test_file_with_numbers_that_could_overflow_is_refused(folder, number, words):
    tensors = read_tensors(folder / FILE)
    tensors["neurons.1.b"][1, 3] = number
    changed_file(folder, lambda t: t.update(tensors), predictors=arrays_fingerprint(tensors))
    with pytest.raises(MinitxError, match=words):
        minitx.load(folder, contextual_sparsity=True)


def test_truncated_file_and_link_to_a_file_that_is_gone_are_refused(folder):
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[:-7])
    with pytest.raises(MinitxError, match=FILE):
        minitx.load(folder, contextual_sparsity=True)
    (folder / FILE).unlink()
    (folder / FILE).symlink_to("elsewhere.safetensors")
    with pytest.raises(MinitxError, match=f"{FILE}: is a link to a file that does not exist; "):
        minitx.load(folder, contextual_sparsity=True)


def test_predictors_that_overflow_float16_are_refused_before_anything_is_written(folder):
    lm, path = minitx.load(folder), folder / "new.safetensors"
    predictors = read_predictors(lm, folder / FILE).predictors
    first = replace(predictors["ffn"][0], a=predictors["ffn"][0].a + 1e6)
    with pytest.raises(MinitxError, match="holds NaN or Inf"):
        write_predictors(lm, predictors | {"ffn": (first, *predictors["ffn"][1:])}, path)
    assert not path.exists()


# Numbers that are not finite ---------------------------------------------------------------------


def test_nan_runs_units_so_that_it_is_not_hidden():
    x, p = np.full((3, 4), np.nan), Predictor(np.ones((4, 2)), np.ones((2, 6)))
    assert Above(p, 1.0)(x, Layer(3)).all()
    assert_same(TopK(p, 2)(x, Layer(3)).sum(-1), 2)


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"neurons": 1.0, "heads": 0.5}], ids=str)
def test_training_on_hidden_states_that_are_not_finite_is_refused(options):
    lm = dense_lm()
    broken = lm.model.embed.w.copy()
    broken[:, 0] = np.nan
    lm = replace(lm, model=replace(lm.model, embed=replace(lm.model.embed, w=broken)))
    with pytest.raises(MinitxError, match="hidden states of the model are NaN or Inf"):
        apply(lm, {"contextual_sparsity": options | {"stories": 1}})


# The command -------------------------------------------------------------------------------------


def short_texts(lm, split, count):
    return [IDS.tolist()] * 2


def test_command_trains_writes_and_measures(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "story_ids", short_texts)
    out = tmp_path / "trained.safetensors"
    train.main([str(folder), "--out", str(out), "--epochs", "1", "--rank", "3"])
    trained = read_predictors(minitx.load(folder), out)
    assert [p.a.shape for p in trained.predictors["ffn"]] == [(16, 3)] * 2
    printed = capsys.readouterr().out
    assert printed.startswith(f"wrote {out}\nlayer") and "all neurons" in printed
    train.main([str(folder), "--out", str(out), "--measure", "--neurons", "1", "--heads", "1"])
    for line in capsys.readouterr().out.splitlines()[1:]:
        _, _, active, run, recall, precision, random = line.split()
        assert (run, recall, random) == ("1.000", "1.000", "1.000"), "all run: recall is 1"
        assert precision == active, "recall by always saying active shows in the precision"


def never(*_):
    raise AssertionError("training has begun")


@pytest.mark.parametrize(
    "words, message",
    [
        ("--stories 0", "stories must be an integer, at least 1; got 0."),
        ("--epochs -1", "epochs must be an integer, at least 1; got -1."),
        ("--measure --neurons 5", "neurons must be a number, 0 to 1, or None; got 5"),
        ("--measure --threshold nan", "threshold must be a number, -100 to 100, or None; got"),
        ("--measure --neurons 0.3 --threshold 2", "got both neurons and threshold; give the share"),
        ("", "already exists; give another --out, or --replace to replace it."),
        ("--out /nowhere/x", "there is no folder /nowhere; create it first."),
        ("--out link", "link already exists"),
        ("--out missing --measure", "missing: there is no such file."),
    ],
)
def test_command_refuses_before_it_trains(folder, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setattr(train, "story_ids", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("elsewhere")
    before = (folder / FILE).read_bytes()
    with pytest.raises(SystemExit):
        train.main([str(folder), *words.split()])
    assert message in capsys.readouterr().err
    assert (folder / FILE).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model"], "left a file"


def test_command_says_why_a_saved_model_has_no_neurons_to_predict(folder, tmp_path, capsys):
    assert cli.main(["precompute", str(tmp_path / "saved"), "-m", str(folder), "--zero-skip"]) == 0
    with pytest.raises(SystemExit):
        train.main([str(tmp_path / "saved"), "--out", str(tmp_path / "new")])
    message = "contextual_sparsity needs a part of type Linear where zero_skip has put a"
    assert message in capsys.readouterr().err


def test_interrupted_command_says_so_and_leaves_no_file(folder, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_predictors", interrupted)
    monkeypatch.setattr(train, "story_ids", short_texts)
    with pytest.raises(SystemExit) as caught:
        train.main([str(folder), "--out", str(tmp_path / "new")])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "stopped.\n"
    assert not (tmp_path / "new").exists()


def test_command_replaces_a_file_if_asked(folder, monkeypatch):
    monkeypatch.setattr(train, "story_ids", short_texts)
    before = (folder / FILE).read_bytes()
    train.main([str(folder), "--replace", "--epochs", "1"])
    assert (folder / FILE).read_bytes() != before


# Figures on stories-relu -------------------------------------------------------------------------


@cache
def dense():
    return minitx.load("stories-relu")


@cache
def added_loss(**options) -> float:
    """Loss on two held-out stories."""
    lm = apply(dense(), {"contextual_sparsity": options}) if options else dense()
    read, tally = stories_to_read(lm, 2), Tally.empty()
    for one in read.texts:
        add_up(tally, lm, one)
    return read.report(tally).loss - (added_loss() if options else 0.0)


def test_added_loss_on_stories_relu_is_a_hundredth_of_that_of_random_neurons():
    """At the default about a quarter of the neurons run. Random ones: twice as many, so that they
    cost at least as much with no predictor to pay for."""
    default, top, chance = (
        added_loss(threshold=1.0),
        added_loss(neurons=0.3),
        added_loss(neurons=0.5, choose="random"),
    )
    assert -0.002 < default < 0.012 and 0 < top < 0.02, (default, top)
    assert chance > 1.0, f"random neurons cost {chance:+.3f}"


def test_shipped_predictors_find_most_active_neurons_of_held_out_stories():
    """Recall beside what is run, and beside random neurons: the figures that the command prints."""
    trained = read_predictors(dense(), dense().folder / FILE)
    texts = train.story_ids(dense(), "evaluation", 2)
    lines = train.measure(dense(), trained.predictors, texts, {"ffn": None, "attn": 0.5}, 1.0)
    found = {line[:14].strip(): line[14:].split() for line in lines.splitlines()[1:]}
    for name, (run, recall, precision, chance) in {
        "all neurons": (0.25, 0.87, 0.83, 0.27), "all heads": (0.5, 0.86, 0.86, 0.5)
    }.items():  # fmt: skip
        figures = [float(x) for x in found[name]][1:]
        assert figures == pytest.approx([run, recall, precision, chance], abs=0.03), name
    assert len(found) == 2 * 5


def test_shipped_file_is_used_and_small(tmp_path):
    size = (shipped()["stories-relu"] / FILE).stat().st_size
    assert size < 200_000
    lm = apply(dense(), {"contextual_sparsity": {}})
    assert not lm.calibrated, "the predictors were trained again"
    assert predictor_of(lm).a.shape == (128, 32)
    copy = tmp_path / "copy"
    shutil.copytree(shipped()["stories-draft"], copy)
    shutil.copy(shipped()["stories-relu"] / FILE, copy)
    with pytest.raises(MinitxError, match="trained for other weights"):
        minitx.load(copy, contextual_sparsity={"neurons": 1.0, "heads": 0.5})
