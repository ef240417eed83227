"""``minitx compare --energy``: the estimate by hand, where bytes are read from, which products of
techniques are of integers, and the flag."""

import json
import re

import numpy as np
import pytest
from tiny import tiny_lm

import minitx
from minitx.cli import main
from minitx.errors import MinitxError
from minitx.lab.compare import compare
from minitx.lab.energy import Constants, Energy, Estimate, read_constants
from minitx.ledger import Entry, counting
from minitx.technique import apply

IDS = list(range(1, 21))


def test_worked_example_by_hand():
    """1000 multiply-adds, of which 400 are of 8-bit and 100 of 4-bit integers, and 20 additions:

        500 * (3.7 + 0.9)      = 2300      floats
        400 * (0.2 + 0.03)     =   92
        100 * 0.23 / 4         =    5.75   half the bits: a quarter
         20 * 0.9              =   18
                                 2415.75

    80 bytes of weights and 16 of the KV cache: DRAM 1300 pJ for 8 bytes, 13,000 + 2600."""
    work = Entry(1000, 80, 16, 20, {8: 400, 4: 100})
    found = Constants().of(work, "dram")
    assert found.multiply_adds == pytest.approx(2415.75)
    assert (found.weights, found.cache) == (13_000, 2600)
    assert found.total == pytest.approx(18_015.75)
    on_chip = Constants().of(work, "sram")  # 100 pJ for 8 bytes
    assert (on_chip.weights, on_chip.cache) == (1000, 200)
    assert on_chip.multiply_adds == found.multiply_adds, "memory changes the price of arithmetic"


def test_estimate_is_by_part_and_relative_to_dense():
    constants = Constants(float32=2, dram=10)
    dense = {"blocks.ffn": Entry(100, 40), "head": Entry(10)}
    changed = {"blocks.ffn": Entry(50, 10, 5)}
    found = Estimate.of(constants, dense, changed, 1e9, 1e9)
    assert found.dense == {"blocks.ffn": Energy(200, 400), "head": Energy(20)}
    assert found.changed == {"blocks.ffn": Energy(100, 100, 50)}
    assert found.ratio == pytest.approx(250 / 620)
    lines = [re.split("  +", line) for line in str(found).splitlines()]
    assert ["blocks.ffn", "0.1", "0.50x", "0.1", "0.25x", "0.1", "-", "0.2", "0.42x"] in lines
    assert ["all", "0.1", "0.45x", "0.1", "0.25x", "0.1", "-", "0.2", "0.40x"] in lines
    assert ["head", "0.0", "0.00x", "0.0", "-", "0.0", "-", "0.0", "0.00x"] in lines


def test_bytes_are_read_on_chip_if_the_model_fits():
    work = {"head": Entry(0, 8)}
    for on_chip, places in ((0, "dram dram"), (1, "dram sram"), (2, "sram sram")):
        found = Estimate.of(Constants(on_chip=on_chip), work, work, 2e6, 1e6)
        assert f"{found.dense_memory} {found.memory}" == places, f"{on_chip} MB on chip"
        assert found.ratio == {"dram sram": pytest.approx(1 / 13)}.get(places, 1)
    text = str(Estimate.of(Constants(on_chip=1), work, work, 2e6, 1e6))
    assert (
        "from DRAM by the dense model, from on-chip SRAM by the changed one (on_chip=1 MB)" in text
    )


def test_constants_are_read_or_refused_in_a_sentence():
    assert read_constants([]) == Constants()
    found = read_constants(["dram=80", "float32=1.5", "on-chip=2", "int8=0"])
    assert found == Constants(dram=80, float32=1.5, on_chip=2, int8=0)
    for words, message in (
        (["dram"], "--energy: expected NAME=VALUE, got 'dram'"),
        (["dran=1"], "--energy has no constant 'dran'; did you mean 'dram'"),
        (["zzz=1"], "no constant 'zzz'; choose from float32, addition, int8, dram, sram, on_chip"),
        (["dram=-1"], "dram must be a number from 0 to 1e[+]09; got '-1'"),
        (["dram=nan"], "dram must be .*; got 'nan'"),
        (["dram=inf"], "dram must be .*; got 'inf'"),
        (["dram=1e300"], "dram must be .*; got '1e300'"),
        (["dram=x"], "dram must be .*; got 'x'"),
        (["dram="], "dram must be .*; got ''"),
        (["dram=1", "dram=2"], "--energy: dram is given twice"),
    ):
        with pytest.raises(MinitxError, match=message) as caught:
            read_constants(words)
        assert "\n" not in str(caught.value)


# Which products are of integers ------------------------------------------------------------------


def work_of(wanted: dict, **changes):
    """The work of a prompt and then a token."""
    lm = apply(tiny_lm(**changes), wanted)
    state = lm.model.new_state()
    with counting(lm) as counts:
        lm.model(np.array(IDS), state)
        lm.model(np.array([3]), state)
    return counts


@pytest.mark.parametrize(
    "wanted, bits",
    [
        ({}, {}),
        ({"quantize": {"run": "stream"}}, {}),  # dequantized
        ({"quantize": {"run": "integers"}}, {8}),
        ({"quantize_cache": {}}, {}),
        ({"order_products": {"accumulator_bits": 20}}, {8}),
        ({"predictive_attention": {"bits": 5}}, {5}),
        ({"predictive_attention": {"codes": "leading-one", "threshold": 0, "share": 0.5}}, {}),
        ({"a3": {"integer_bits": 3, "fraction_bits": 4}}, {8, 9}),  # weights have 9 bits
        ({"a3": {"integer_bits": None}}, {}),
        ({"elsa": {"stories": 1}}, {}),
    ],
    ids=str,
)
def test_technique_counts_integers_by_their_bits(wanted, bits):
    total = work_of(wanted).total()
    assert set(total.integers) == set(bits)
    assert all(n > 0 for n in total.integers.values()) and total.floats > 0


def test_predicted_scores_are_of_integers_and_the_exact_ones_of_floats():
    """All S d predictions of each query head; all else is of floats."""
    counts = work_of({"predictive_attention": {"bits": 4}})
    c = tiny_lm().model.config
    predicted = c.layers * c.heads * c.head_width * (20 * 20 + 21)
    assert counts.total().integers == {4: predicted}


def test_a_table_read_is_an_addition_but_no_multiply_add():
    for wanted in ({"lut_centroid": {"stories": 1}}, {"lut_bit_serial": {}}, {"lut_product": {}}):
        counts = work_of(wanted)
        reads = counts.events["table reads"] + counts.events["table entries computed"]
        assert counts.total().additions == reads > 0, wanted


def test_dota_detects_in_integers_of_its_bits():
    lm = apply(minitx.load("stories"), {"dota": {"bits": 3}})
    with counting(lm) as counts:
        lm.logits(IDS)
    assert set(counts.total().integers) == {3}


# The flag ----------------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch):
    from test_compare import story_lm

    monkeypatch.setattr(minitx, "load", lambda *rest, **options: story_lm())


def test_compare_prints_the_energy_only_if_asked(loads, capsys):
    words = ["compare", "--quantize", "run=integers", "--stories", "2"]
    assert main(words) == 0
    assert "Energy" not in capsys.readouterr().out
    assert main([*words, "--energy", "dram=80", "on_chip=0.001"]) == 0
    out = capsys.readouterr().out
    assert "Energy in nJ per new token, an estimate: counts times constants" in out
    assert "Bytes are read from DRAM (on_chip=0.001 MB)" in out and "dram=80," in out
    assert max(map(len, out.splitlines())) <= 100


def test_compare_json_has_the_energy_of_the_counted_work(loads, capsys):
    words = ["compare", "--quantize", "run=integers", "--stories", "2", "--json"]
    assert main(words) == 0
    assert "energy" not in json.loads(capsys.readouterr().out)
    assert main([*words, "--energy"]) == 0
    found = json.loads(capsys.readouterr().out)
    ffn, energy = found["generation"]["changed"]["blocks.ffn"], found["energy"]
    assert ffn["integers"] == {"8": ffn["multiply_adds"]}
    expected = 0.23 * ffn["multiply_adds"], 162.5 * ffn["weight_bytes"], 0
    assert energy["changed"]["blocks.ffn"] == {
        "multiply_adds": pytest.approx(expected[0]),
        "weights": pytest.approx(expected[1]),
        "cache": 0,
        "total": pytest.approx(sum(expected)),
    }
    assert energy["unit"] == "pJ per new token" and energy["constants"]["float32"] == 3.7 + 0.9
    assert energy["memory"] == {"dense": "dram", "changed": "dram"} and 0 < energy["ratio"] < 1


def test_a_model_fits_on_chip_with_its_kv_cache_of_a_full_context():
    from test_compare import PLAN, story_lm

    lm = story_lm()
    context, plain = lm.model.config.context, compare(lm, lm, "", PLAN, bar=False)
    size = plain.size.weights + context * plain.size.cache
    for room, place in ((1.001, "sram"), (0.999, "dram"), (0.5, "dram")):
        found = plain.with_energy(Constants(on_chip=room * size / 1e6), context)
        assert found.energy.memory == found.energy.dense_memory == place, f"{room} of its bytes"
        assert found.energy.ratio == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["--energy", "dram=-3"], "--energy: dram must be a number from 0 to 1e+09; got '-3'"),
        (["--energy", "x"], "--energy: expected NAME=VALUE, got 'x'"),
        (["--all", "--energy"], "--energy has no effect with --all"),
    ],
)
def test_bad_energy_is_refused_before_anything_runs(words, message, capsys):
    assert main(["compare", *words]) == 2
    assert message in capsys.readouterr().err


def test_ratio_to_a_model_that_takes_no_energy_is_null_in_json():
    free = Constants(**dict.fromkeys(("float32", "addition", "int8", "dram", "sram"), 0.0))
    work = {"head": Entry(10, 40)}
    found = Estimate.of(free, work, work, 1e9, 1e9)
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["ratio"] is None
