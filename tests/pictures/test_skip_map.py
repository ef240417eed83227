"""``minitx map``: the state of a cell, the layout of the text, and the SVG picture."""

import json
from xml.dom import minidom

import pytest
from tiny import TOKENIZER, ScriptedLoop, tiny_lm

from minitx.pictures import skip_map_svg
from minitx.pictures.cells import Cells
from minitx.pictures.rounds import marks, rounds_text, was_speculative
from minitx.pictures.skip_map import Cell, skip_map, state_of
from minitx.pictures.skip_map_svg import as_svg
from minitx.pictures.token_columns import Column, columns_of, lines, shown, width
from minitx.pictures.token_work import Round, Spent
from minitx.technique import apply


def mapped(flags, new=8, family="llama"):
    dense = tiny_lm(family)
    return skip_map(dense, apply(dense, flags), "a title", "once upon", new, temperature=0)


DENSE = Spent(attn=100, ffn=200)


@pytest.mark.parametrize(
    "spent, state",
    [
        (Spent(attn=100, ffn=200), "ran"),
        (Spent(attn=60, ffn=200), "part"),
        (Spent(attn=100, ffn=200, later=300), "later"),
        (Spent(attn=100, ffn=4), "no ffn"),  # it only decided
        (Spent(attn=4, ffn=200), "no attention"),
        (Spent(kv=40), "kv"),
        (Spent(other=9), "skipped"),  # a router
        (Spent(other=290), "ran"),  # attention and FFN in one part
        (Spent(), "skipped"),
    ],
)
def test_state_of_a_cell(spent, state):
    assert state_of(spent, DENSE, read=True) == state
    assert state_of(spent, DENSE, read=False) == "none"


def test_additions_instead_of_multiply_adds_are_work():
    spent = Spent(attn=100)
    spent.additions["ffn"] = 150
    assert state_of(spent, DENSE, read=True) == "part"


def test_map_of_the_dense_model_is_full():
    found = mapped({})
    assert (found.blocks, found.all) == (1, 1)
    assert {cell.state for row in found.cells["model"] for cell in row[:-1]} == {"ran"}
    assert {row[-1].state for row in found.cells["model"]} == {"none"}


def test_text_shows_each_block_under_each_token_of_a_wrapped_text():
    found = mapped({"layer_skip": {"drop": "1", "unit": "ffn"}}, new=30)
    title, *blocks, legend, sentence = found.text(40).split("\n\n")
    assert title == "a title" and len(blocks) > 1
    assert all(len(line) <= 40 for block in blocks for line in block.splitlines())
    for block in blocks:
        text, first, second = block.splitlines()
        assert first.startswith("layer 0  ") and second.startswith("layer 1  ")
        assert set(first[9:]) <= {"█", " "} and set(second[9:]) <= {"▀", " "}
        for above, cell in zip(text[9:], first[9:]):
            assert cell != " " or above == " ", "a gap only where a token begins with a space"
    assert legend == "█ ran   ▀ FFN skipped   blank: a token that the model did not read"
    assert sentence.startswith(f"{found.blocks:.2f}x of the dense multiply-adds in the blocks")


def test_share_of_dense_is_that_of_the_layers_that_ran():
    found = mapped({"layer_skip": {"drop": "0"}})
    assert found.blocks == pytest.approx(0.5)
    assert [row[3].state for row in found.cells["model"]] == ["skipped", "ran"]


def test_fewer_blocks_than_dense_are_compared_with_their_mean():
    found = mapped({"layer_merge": {"size": 2, "first": 0}})
    assert [row[3].state for row in found.cells["model"]] == ["ran"]
    assert found.blocks == pytest.approx(0.5)


def test_speculation_adds_rows_for_rounds_and_rejected_tokens():
    found = mapped({"jacobi": {"guesses": 2, "choose": "random"}}, new=6)
    text = found.text()
    assert "\nrounds " in text and "\nrejected " in text
    assert f"round {len(found.work.rounds)} " in text
    assert found.blocks > 1


def test_json_has_every_cell():
    found = json.loads(json.dumps(mapped({"early_exit": {"measure": "random"}}).as_dict()))
    assert len(found["tokens"]) == found["prompt_tokens"] + 8
    assert [len(row) for row in found["models"]["model"]] == [len(found["tokens"])] * 2
    assert found["rounds"] == []


def test_svg_is_well_formed_and_says_what_ran():
    found = mapped({"jacobi": {"guesses": 2, "choose": "random"}, "fold_norms": {}})
    root = minidom.parseString(str(as_svg(found))).documentElement
    notes = [t.firstChild.data for t in root.getElementsByTagName("title")][1:]
    assert len(notes) == len(found.columns), "one note for each token"
    assert notes[0].startswith("token 0: <s>\n") and "layer 0-1: ran (" in notes[0]
    assert any("a token sampled from the logits" in note for note in notes)
    places = [float(e.getAttribute("x") or 0) for e in root.getElementsByTagName("rect")]
    assert max(places) < float(root.getAttribute("width"))


@pytest.mark.parametrize(
    "state, spent, colors",
    [
        ("ran", DENSE, {"ATTENTION", "FFN"}),
        ("later", DENSE, {"LATER_ATTENTION", "LATER_FFN"}),
        ("no ffn", Spent(attn=100), {"ATTENTION"}),
        ("no attention", Spent(kv=9, ffn=200), {"CACHED", "FFN"}),
        ("kv", Spent(kv=9), {"CACHED"}),
        ("skipped", Spent(), set()),
    ],
)
def test_colors_of_a_cell_say_what_ran(state, spent, colors):
    cells = Cells()
    skip_map_svg.draw_cell(cells, Cell(state, spent, DENSE), 0, 0, 10)
    drawn = {fill for fill, _ in cells.paths} - {skip_map_svg.NOTHING}
    assert drawn == {getattr(skip_map_svg, name) for name in colors}


def test_rounds_by_hand():
    """Two guesses accepted and a token sampled; then one sampled after a wrong guess."""
    rounds = [Round(3, [7, 8, 9], 2, []), Round(6, [5], 0, [(6, 4)])]
    assert was_speculative(rounds), "guesses were accepted"
    assert marks(rounds) == {3: "=", 4: "=", 5: "+", 6: "+"}
    first, second, totals = rounds_text(rounds, {i: chr(96 + i) for i in range(1, 10)}).splitlines()
    assert first == "round 1  gh[i]"
    assert second == "round 2  [e]   rejected: d"
    assert totals.startswith("2 rounds, 2.00 tokens each: 2 guesses accepted, 1 rejected, 2 tokens")


def test_rounds_are_shown_only_for_guesses_round_after_round():
    plain, wrong = Round(0, [1], 0, []), Round(0, [1], 0, [(0, 2)])
    for rounds, expected in (
        ([plain, plain], False),
        ([wrong, wrong], True),  # every guess was wrong
        ([wrong, plain], False),  # another model began: a cascade
        ([Round(0, [1, 2], 1, [(0, 3)])], False),  # several texts, and one was taken: a vote
    ):
        assert was_speculative(rounds) == expected, rounds


def test_map_of_a_text_that_no_block_wrote():
    """An answer from a store: every cell is empty."""
    dense = tiny_lm()
    stored = tiny_lm(decode=ScriptedLoop(([111, 112, 113],), []))
    found = skip_map(dense, stored, "a title", "once", 3)
    assert found.states == ["none"] and found.blocks == 0
    assert "No block of the model ran" in found.text()
    assert str(as_svg(found)).startswith("<svg")


def test_columns_are_as_wide_as_their_text():
    columns = columns_of(TOKENIZER, TOKENIZER.encode("é on\n"))
    assert [c.text for c in columns] == ["<s>", "~", "é", " ", "on", "↵"]
    assert width("日本") == 4 and width("e\u0301") == 1
    assert shown("a" * 30) == "aaaaaaa…aaaaaa"
    assert (Column(0, 0, "  x").gap, Column(0, 0, " ").gap) == (2, 0)
    assert ["".join(c.text for c in line) for line in lines(columns, 5)] == ["<s>~é", " on↵"]
