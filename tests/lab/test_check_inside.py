"""``minitx check`` continues inside the first wrong block: each step that is broken on purpose is
named, in every family, and the sentence says where and how it differs.

That every step of a correct model agrees: test_reference.py."""

import json
from dataclasses import replace

import numpy as np
import pytest
from same import assert_same
from test_check import with_config, with_part, with_weights

from minitx import ops
from minitx.build import build
from minitx.differences import describe
from minitx.lab.check import check_models, compare
from minitx.lab.comparison import compare_values
from minitx.lab.inside import STEPS, inside
from minitx.lab.reference import FOLDER, read_reference, seeded_model, write_reference
from minitx.model import Attend, Attention, Block, Rope
from minitx.tree import Part, part, rebuild, weights

LLAMA, GPT2, PARALLEL, SERIAL = REFERENCES = [
    read_reference(FOLDER / f"random-{name}.npz")
    for name in ("llama-biases", "gpt2-gelu-tied", "neox-parallel", "neox-serial")
]
BLOCK = 1

# The weight in which each step is the first to differ. Only llama has a gate.
WEIGHTS = {
    "attention norm": "attn.norm.gain",
    "queries": "attn.qkv.q.w",
    "keys": "attn.qkv.k.w",
    "values": "attn.qkv.v.w",
    "attention output": "attn.out.b",
    "FFN norm": "ffn.norm.gain",
    "FFN gate": "ffn.expand.gate.w",
    "FFN up": "ffn.expand.up.b",
    "FFN output": "ffn.down.w",
}


def assert_step(found, step, *words, block=BLOCK):
    """This step is named, with these words, and no step before it differs."""
    assert found.bug.name == f"block {block}", found.explanation
    assert found.inside is not None and found.inside.bug is not None, found.explanation
    assert f"Inside block {block} it begins in the {step}: at position" in found.explanation
    for word in words:
        assert word in found.explanation, found.explanation
    names = [s.name for s in found.inside.steps]
    before = found.inside.steps[: names.index(step)]
    assert all(s.relative["float64"] < 1e-13 for s in before), "what comes before agrees"
    assert names == [s for s in STEPS if s in found.reference.inside], "all steps are compared"


@pytest.mark.parametrize(
    "step, reference",
    [(step, reference) for step in WEIGHTS for reference in REFERENCES if step in reference.inside],
    ids=lambda value: getattr(value, "name", value),
)
def test_wrong_weight_names_its_step(step, reference):
    path = f"stack.blocks.{BLOCK}.{WEIGHTS[step]}"

    def nudge(w):
        w[path][..., 2] += 0.05

    assert_step(with_weights(reference, nudge), step)


@pytest.mark.parametrize("step", ["values", "FFN gate"])
def test_tiny_change_is_found_inside_too(step):
    def nudge(w):
        w[f"stack.blocks.{BLOCK}.{WEIGHTS[step]}"][0, 0] += 1e-7

    assert_step(with_weights(LLAMA, nudge), step, "a constant has too few digits")


# Wrong functions ----------------------------------------------------------------------------------


@part
class Changed(Part):
    """A part whose result is changed."""

    inner: Part
    change: object

    def __call__(self, *arguments):
        return self.change(self.inner(*arguments), *arguments)


def with_rope(reference, make):
    """With another rotation in every block: they share one part."""

    def made(dtype):
        model = seeded_model(reference.config, reference.seed, dtype)
        return rebuild(model, lambda node: make(node) if type(node) is Rope else None)

    return compare(reference, made)


ROTATED = [LLAMA, PARALLEL, SERIAL]


@pytest.mark.parametrize("reference", ROTATED, ids=lambda r: r.name)
def test_wrong_rotation_names_the_rotated_queries(reference):
    found = with_rope(reference, lambda rope: replace(rope, sin=-rope.sin))
    assert_step(found, "rotated queries", "head 0, column 0: expected ", block=0)
    found = with_config(reference, rope_base=3000.0)
    assert_step(found, "rotated queries", block=0)


@pytest.mark.parametrize("reference", ROTATED, ids=lambda r: r.name)
def test_keys_without_rotation_are_named(reference):
    def not_keys(rope):
        calls = []  # keys are rotated before queries

        def change(y, x, tokens):
            calls.append(x)
            return x if len(calls) % 2 else y

        return Changed(rope, change)

    assert_step(with_rope(reference, not_keys), "rotated keys", "head 0, column 0", block=0)


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda r: r.name)
def test_wrong_scores_name_the_attention_weights(reference):
    found = with_part(reference, Attend, lambda attend: replace(attend, scale=1.0))
    assert_step(found, "attention weights", "head 0, key 0: expected ")

    def see_the_next_key(y, q, k, v, layer):
        T = q.shape[-2]
        mask = np.arange(T) > np.arange(T)[:, None] + 1
        return ops.attention(q, k, v, q.shape[-1] ** -0.5, mask)

    found = with_part(reference, Attend, lambda attend: Changed(attend, see_the_next_key))
    assert_step(found, "attention weights")
    assert found.inside.bug.difference.startswith(f"At position {found.inside.positions[0]}, ")


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda r: r.name)
def test_heads_merged_in_another_order_are_named(reference):
    def transposed(y, q, k, v, layer):
        if v.shape[-1] == v.shape[-2]:  # the weights are right, the sums are in another order
            return y
        return y[..., ::-1, :, :]

    found = with_part(reference, Attend, lambda attend: Changed(attend, transposed))
    assert_step(found, "weighted sum of the values")


@part
class NoResidual(Block):
    """Forgets to add the attention's input to its output."""

    def __call__(self, x, layer):
        x = self.attn(x, layer)
        return x + self.ffn(x, layer)


@part
class NoLastResidual(Block):
    """Forgets to add the FFN's input to its output."""

    def __call__(self, x, layer):
        return self.ffn(x + self.attn(x, layer), layer)


@pytest.mark.parametrize("reference", [LLAMA, GPT2, SERIAL], ids=lambda r: r.name)
def test_missing_residual_is_named(reference, monkeypatch):
    monkeypatch.setattr("minitx.lab.inside.Block", NoResidual)  # so that it is recorded
    found = with_part(reference, Block, lambda b: NoResidual(b.attn, b.ffn))
    assert_step(found, "residual after attention")
    monkeypatch.setattr("minitx.lab.inside.Block", NoLastResidual)
    found = with_part(reference, Block, lambda b: NoLastResidual(b.attn, b.ffn))
    assert found.inside.bug is None
    assert "Inside block 1, every step agrees at positions" in found.explanation
    assert "look at what is added to the residual stream" in found.explanation


def test_parallel_and_serial_blocks_are_told_apart():
    found = with_config(PARALLEL, parallel=False)
    assert_step(found, "FFN norm", block=0)
    found = with_config(SERIAL, parallel=True)
    assert_step(found, "residual after attention", block=0)


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda r: r.name)
def test_wrong_activation_names_the_hidden_neurons(reference):
    other = "gelu" if reference is GPT2 else "relu"
    if reference is LLAMA:

        def made(dtype):
            def plain_product(node):  # the gate without its activation
                if type(node).__name__ == "SwiGLU":
                    return Changed(node, lambda y, x: node.gate(x) * node.up(x))

            model = seeded_model(LLAMA.config, LLAMA.seed, dtype)
            return rebuild(model, plain_product)

        found = compare(LLAMA, made)
        assert found.inside.bug.name == "hidden neurons"
    else:
        assert_step(with_config(reference, activation=other), "hidden neurons", block=0)


def test_wrong_epsilon_names_the_norm():
    for reference in REFERENCES:
        assert_step(with_config(reference, norm_eps=1e-2), "attention norm", block=0)


def test_gate_and_up_swapped_are_named():
    def swap(w):
        gate, up = (w[f"stack.blocks.{BLOCK}.ffn.expand.{name}.w"] for name in ("gate", "up"))
        gate[:], up[:] = up.copy(), gate.copy()

    assert_step(with_weights(LLAMA, swap), "FFN gate")


# The sentence and the report ----------------------------------------------------------------------


def test_sentence_is_that_of_describe():
    found = with_part(LLAMA, Attention, lambda a: replace(a, qkv=replace(a.qkv, k=a.qkv.v)))
    model = seeded_model(LLAMA.config, LLAMA.seed, "float64")
    first = LLAMA.inside_rows[0]
    keys = LLAMA.inside["keys"][BLOCK][0]
    values = inside(model, BLOCK, LLAMA.ids)["values"][first]
    said = describe(values, keys, ("column",), 1e-10)
    assert_step(found, "keys", f"at position {first}, t{said[1:]}")


def test_factor_inside_is_said():
    def double(w):
        w[f"stack.blocks.{BLOCK}.attn.out.w"] *= 8**0.5

    found = with_weights(GPT2, lambda w: (double(w), w[f"stack.blocks.{BLOCK}.attn.out.b"].fill(0)))
    assert_step(found, "attention output")

    def scaled(w):
        for name in "wb":
            w[f"stack.blocks.{BLOCK}.attn.out.{name}"] *= 8**0.5

    found = with_weights(GPT2, scaled)
    assert_step(found, "attention output", "All are off by the factor 2.828 = sqrt(8).")


def test_wrong_stage_that_is_no_block_is_described_itself():
    def head(w):
        w["head.w"] *= 2

    found = with_weights(LLAMA, head)
    assert found.bug.name == "logits" and found.inside is None
    assert "At position 0, the first difference is at column 0" in found.explanation
    assert "All are off by the factor 2." in found.explanation


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_inside_is_named_and_json_stays_valid(bad):
    def damage(w):
        w[f"stack.blocks.{BLOCK}.ffn.expand.up.w"][:, 5] = bad

    found = with_weights(LLAMA, damage)
    assert_step(found, "FFN up", "NaN or Inf", "difference is at neuron 5")
    json.dumps(found.as_dict(), allow_nan=False)


def test_report_shows_the_steps_in_a_table(capsys, monkeypatch):
    from minitx.lab import check

    def broken(config, seed, dtype):
        model = seeded_model(config, seed, dtype)
        return rebuild(model, lambda n: replace(n, sin=-n.sin) if type(n) is Rope else None)

    monkeypatch.setattr(check, "seeded_model", broken)
    assert check_models(["random-llama-gqa"]) == 1
    text = capsys.readouterr().out
    assert "Inside block 0, at positions 34 and 69:" in text
    after = text[text.index("Inside block 0, at positions") :].splitlines()
    rows = {step: line for step in STEPS for line in after if line.startswith(f"{step}  ")}
    assert list(rows) == list(STEPS)
    assert all(rows[step].count("[OK]") == 2 for step in list(STEPS)[:4])
    assert all(rows[step].count("[DIFF]") == 2 for step in list(STEPS)[4:])
    assert max(map(len, text.splitlines())) <= 100
    assert check_models(["random-llama-gqa"], as_json=True) == 1
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert model["bug_in"] == "block 0" and model["inside"]["bug_in"] == "rotated queries"
    assert [step["stage"] for step in model["inside"]["steps"]] == list(STEPS)
    assert model["inside"]["explanation"] in model["explanation"]


def test_steps_are_written_and_read(tmp_path):
    read = read_reference(write_reference(LLAMA, tmp_path))
    assert read.inside_rows.tolist() == LLAMA.inside_rows.tolist()
    assert list(read.inside) == list(STEPS)
    for step, values in LLAMA.inside.items():
        assert_same(read.inside[step], values, step, dtype=True)


def test_small_numbers_are_not_more_exact_than_rounding_allows():
    """Position 3 differs by 1e-15, which is rounding beside the largest number, at position 7."""
    expected, found = np.array([[1e-9, 2e-9], [1, 0.5]]), np.array([[1e-9 + 1e-15, 2e-9], [1, 0.6]])
    values = [{"float32": x.astype("float32"), "float64": x} for x in (found, expected)]
    stage = compare_values("keys", *values, (3, 7))
    assert stage.difference == (
        "At position 7, the only difference is at column 1: expected 0.5, got 0.6."
    )


def test_reference_without_steps_still_names_the_block(tmp_path):
    bare = replace(LLAMA, inside={}, inside_rows=np.array([], int))
    read = read_reference(write_reference(bare, tmp_path))
    assert read.inside == {}
    found = with_config(read, norm_eps=1e-2)
    assert found.bug.name == "block 0" and found.inside is None
    assert "A bug: it first appears in block 0" in found.explanation


def test_other_number_of_heads_is_told_by_the_shape():
    config = replace(LLAMA.config, kv_heads=1)

    def made(dtype):
        drawn = weights(seeded_model(LLAMA.config, LLAMA.seed, dtype))
        return build(config, lambda path, shape: drawn[path][..., : shape[-1]])

    found = compare(LLAMA, made)
    assert_step(found, "keys", "Expected the shape (8,), got (4,)".lower()[1:], block=0)


def test_recording_changes_nothing():
    for reference in REFERENCES:
        model = seeded_model(reference.config, reference.seed, "float64")
        into = inside(model, BLOCK, reference.ids)
        T = len(reference.ids)
        assert all(values.shape[0] == T for values in into.values())
        if reference is not PARALLEL:
            x = into["residual after attention"] + into["FFN output"]
            theirs = reference.stages("float64")[f"block {BLOCK}"]
            assert_same(x[reference.rows], theirs, f"{reference.name}: block", tolerance=1e-12)
