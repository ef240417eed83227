"""``python -m minitx.lab.layer_events``: what a technique does, layer by layer."""

import re

import pytest
from tiny import tiny_lm

from minitx.lab import layer_events as module
from minitx.lab.layer_events import MONITORED, LayerEvents, key_of, layer_events, main
from minitx.technique import find


def test_worked_example_by_hand():
    """Layer 0: 3 of 4 lookups hit, 10 of 40 multiply-adds are left. Layer 1: none hit."""
    found = LayerEvents(
        "x",
        (("hits", "lookups"), MONITORED),
        {"0": module.Counter({"hits": 3, "lookups": 4}), "1": module.Counter({"lookups": 2})},
        {"0": 10, "1": 40},
        {"0": 40, "1": 40},
    )
    *_, heading, first, second, whole = str(found).splitlines()
    assert heading.split() == ["multiply-adds", "hits", "lookups"]
    assert first.split() == ["0", "0.250x", "75.0%", "4"]
    assert second.split() == ["1", "1.000x", "0.0%", "2"]
    assert whole.split() == ["all", "0.625x", "50.0%", "6"]


def test_path_belongs_to_a_layer_and_to_a_part_of_the_block():
    for path, layer, part in (
        ("model.stack.blocks.3.ffn.down", "3", "ffn.down"),
        ("model.stack.blocks.12.inner.attn.inner.out", "12", "attn.out"),
        ("model.stack.blocks.0", "0", "block"),
        ("model.head", "", ""),
        ("", "", ""),
    ):
        assert (key_of(path, False), key_of(path, True)) == (layer, part), path


def test_layers_and_parts_sum_to_the_same_events():
    lm, technique = tiny_lm("gpt2"), find("zero_skip")
    by_layer, by_part = (layer_events(lm, technique, {}, 1, parts) for parts in (False, True))
    assert list(by_layer.events) == ["0", "1"] and list(by_part.events) == ["ffn.down"]
    assert sum(by_layer.events.values(), module.Counter()) == by_part.events["ffn.down"]
    assert by_part.multiply_adds["ffn.down"] < by_part.dense["ffn.down"]
    assert by_part.multiply_adds["ffn.expand.up"] == by_part.dense["ffn.expand.up"]
    assert "1 held-out stories, 48 tokens" in str(by_layer), "cut to the context"


def test_part_that_replaces_several_is_compared_with_their_sum():
    lm = tiny_lm("gpt2")
    found = layer_events(lm, find("negative_skip"), {"every": 4}, 1, parts=True)
    assert "ffn.expand" not in found.dense and found.multiply_adds["ffn.expand"]
    row = next(line for line in str(found).splitlines() if line.startswith("ffn.expand"))
    assert re.match(r"ffn.expand +\d\.\d{3}x", row), row


def test_checks_of_the_monitor_are_printed_as_a_share():
    options = {"neurons": 0.5, "stories": 1, "epochs": 1, "monitor": 8, "limit": 0.001}
    found = layer_events(tiny_lm("gpt2"), find("contextual_sparsity"), options, 1)
    heading = str(found).splitlines()[-4]
    assert "checks above the limit" in heading and "quality checks" in heading
    assert "100.0%" in str(found), "every check of random weights is above 0.001"


def test_part_inside_another_has_no_row_unless_it_counts_events_or_is_in_the_dense_model():
    found = LayerEvents("x", (), {}, {"ffn": 6, "ffn.router": 2}, {"ffn.down": 16})
    rows = [line.split() for line in str(found).splitlines()[3:]]
    assert rows == [["ffn", "0.500x"], ["all", "0.500x"]], "8 of 16, the router's included"


def test_technique_without_events_has_multiply_adds_only():
    found = layer_events(tiny_lm(), find("perforate"), {"rate": 0.5, "rates": "uniform"}, 1)
    assert str(found).splitlines()[-4].split() == ["multiply-adds"]


def test_command_prints_the_table_and_refuses_bad_words(capsys, monkeypatch):
    monkeypatch.setattr(module, "load", lambda name: tiny_lm(name))
    main(["zero_skip", "prompts=dense", "-m", "gpt2", "--stories", "1", "--parts"])
    assert "ffn.down" in capsys.readouterr().out
    for words in (["nothing"], ["zero_skip", "a=1"], ["zero_skip", "--stories", "0"], []):
        with pytest.raises(SystemExit) as stopped:
            main([*words, "-m", "gpt2"])
        out, err = capsys.readouterr()
        assert stopped.value.code == 2 and out == "" and "error: " in err, words


def test_command_may_be_stopped(capsys, monkeypatch):
    def stopped(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "load", stopped)
    with pytest.raises(SystemExit) as found:
        main(["zero_skip"])
    assert found.value.code == 130 and capsys.readouterr().err == "stopped.\n"
