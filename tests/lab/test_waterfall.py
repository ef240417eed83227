"""``minitx waterfall``: the steps are the models with one technique more, in the order of
application."""

import json

import pytest
from tiny import tiny_lm

from minitx.errors import MinitxError
from minitx.lab.compare import Workload, continue_all, to_read
from minitx.lab.waterfall import waterfall
from minitx.technique import apply
from minitx.text import Text

POND = Text("The balance of once and twice: a fence, a pond, and a stone. " * 4, "pond.txt")
PLAN = Workload(text=POND, tokens=60, prompts=2)
SKIP = {"unit": "layer", "choose": "last", "count": 1}
WANTED = {"layer_skip": SKIP, "quantize": {}, "fold_norms": {}}


@pytest.fixture(scope="module")
def found():
    return waterfall(tiny_lm(name="tiny"), WANTED, PLAN, bar=False)


def test_steps_are_in_the_order_in_which_techniques_are_applied(found):
    labels = [step.label for step in found.steps]
    assert labels[:3] == ["dense", "+ fold-norms", "+ quantize"]
    assert labels[3] == "+ layer-skip unit=layer choose=last count=1"


def test_steps_count_what_the_ledger_counts(found):
    lm = tiny_lm()
    prompts = to_read(lm, PLAN).prompts(2)
    for step, names in zip(found.steps, ([], ["fold_norms"], ["fold_norms", "quantize"])):
        changed = apply(lm, {name: WANTED[name] for name in names})
        texts, counts = continue_all(changed, prompts, lambda: None)
        tokens = sum(map(len, texts))
        for part, entry in counts.by_group().items():
            assert step.parts[part] == entry.divided(tokens), f"{part} of {step.label}"
            amount = step.amounts("multiply_adds").get(part, 0)
            assert amount == entry.divided(tokens).multiply_adds, f"{part} is missing in the bars"


def test_skipped_layer_saves_multiply_adds_and_quantize_saves_bytes(found):
    def total(number, name):
        return sum(found.steps[number].amounts(name).values())

    assert total(1, "multiply_adds") == total(0, "multiply_adds")
    assert total(2, "weight_bytes") < 0.7 * total(1, "weight_bytes")
    assert total(3, "multiply_adds") < total(2, "multiply_adds")


def test_nothing_to_add_and_what_does_not_fit_are_refused():
    with pytest.raises(MinitxError, match="Expected at least one technique"):
        waterfall(tiny_lm(), {}, PLAN, bar=False)
    with pytest.raises(MinitxError, match="zero_skip needs FFNs with ReLU"):
        waterfall(tiny_lm(), {"zero_skip": {}}, PLAN, bar=False)


def test_command_prints_bars_json_and_a_picture(run, workdir):
    (workdir / "pond.txt").write_text(POND.content)
    words = "waterfall", "-m", "toy", "--text", "pond.txt", "--prompts", "1", "--quantize"
    status, out, _ = run(*words, "--svg", "a.svg")
    assert status == 0 and "+ quantize" in out and max(map(len, out.splitlines())) <= 100
    assert ">+ quantize</text>" in (workdir / "a.svg").read_text("utf-8")
    steps = json.loads(run(*words, "--json")[1])["steps"]
    assert [step["label"] for step in steps] == ["dense", "+ quantize"]
    status, out, err = run("waterfall", "-m", "toy")
    assert (status, out) == (2, "") and "at least one technique" in err
