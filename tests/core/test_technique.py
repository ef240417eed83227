"""The machinery: options, order, refusals, swapping, cards, flags; on made-up techniques."""

import json
import re
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from same import assert_same
from tiny import tiny_folder, tiny_lm, tiny_model

import minitx
from minitx import technique as module
from minitx.cli import main
from minitx.errors import MinitxError
from minitx.lab.sweep import settings
from minitx.model import FFN, QKV, SwiGLU
from minitx.technique import Option, apply, find, need, read_card, swap, technique, wrap
from minitx.tree import Part, part


@part
class Wrapped(Part):
    inner: Part
    tag: str

    def __call__(self, *args):
        return self.inner(*args)


@pytest.fixture
def made_up(monkeypatch):
    """Three techniques: two wrap the FFN, at two levels; one replaces its expansion for good."""
    module.techniques()  # all are imported: one that is later would be forgotten with the copy
    monkeypatch.setattr(module, "REGISTRY", dict(module.REGISTRY))
    applied = []

    def wrap(name, level):
        def function(
            lm, *, times: int = 1, mode: Literal["a", "b"] = "a", share: float | None = None
        ):
            applied.append((name, times, mode, share))
            return swap(lm, FFN, lambda ffn: Wrapped(ffn, name))

        function.__name__ = name
        presets = {"twice": {"times": 2}, "half": {"share": 0.5, "mode": "b"}}
        technique(level=level, exact=True, neutral={}, presets=presets)(function)

    def swallow(lm):
        """Swallow the expansion."""
        applied.append("swallow")
        return swap(lm, SwiGLU, lambda part: replace(Wrapped(part, "gone"), inner=Hidden(part.up)))

    def wants_swiglu(lm):
        return swap(lm, SwiGLU, lambda part: part)

    wrap("outer", "block")
    wrap("inner", "ffn")
    technique(level="weights", exact=False, neutral={})(swallow)
    technique(level="ffn", exact=False, neutral={})(wants_swiglu)
    own = ("outer", "inner", "swallow", "wants_swiglu")
    known = module.names() | dict.fromkeys(own, "minitx.technique")
    monkeypatch.setattr(module, "names", lambda: known)
    return applied


@part
class Hidden(Part):
    up: Part

    def __call__(self, x):
        return self.up(x)


def test_levels_decide_the_order_not_the_flags(made_up):
    lm = tiny_lm()
    one = apply(lm, {"outer": True, "swallow": True, "inner": {"times": 3}})
    assert made_up == ["swallow", ("inner", 3, "a", None), ("outer", 1, "a", None)]
    other = apply(lm, {"inner": {"times": 3}, "swallow": {}, "outer": {}})
    assert repr(one) == repr(other)
    ffn = one.model.stack.blocks[1].ffn
    assert (ffn.tag, ffn.inner.tag) == ("inner", "outer")  # FFN is found inside what is there
    assert apply(lm, {"outer": False}) is lm


def test_two_techniques_for_the_same_part_are_refused_by_name(made_up):
    with pytest.raises(MinitxError) as caught:
        apply(tiny_lm(), {"wants_swiglu": True, "swallow": True})
    assert str(caught.value) == (
        "wants_swiglu needs a part of type SwiGLU, which swallow has replaced; use one of the two."
    )
    with pytest.raises(MinitxError, match="type SwiGLU, and this model has none"):
        apply(tiny_lm("gpt2"), {"swallow": True})


def test_refusal_names_the_technique_in_the_way():
    """kv_share needs equally many key heads in the layers that share: head_prune removes some.
    padding_skip and function_tables do not matter, and a refusal of its own stays as it is."""
    lm = tiny_lm("gpt2")
    others = {"function_tables": True, "padding_skip": True}
    prune = {"head_prune": {"share": 0.25, "choose": "random"}}
    share = {"kv_share": {"first": 0, "size": 2}}
    for wanted in (prune | share, others | prune | share):
        with pytest.raises(MinitxError) as caught:
            apply(lm, wanted)
        expected = "(kv_share fits without head_prune: use one of the two)."
        assert str(caught.value).endswith(expected)
        assert caught.value.__cause__ is None and "\n" not in str(caught.value)
    wrong = {"kv_share": {"first": 5, "size": 2}}
    with pytest.raises(MinitxError) as alone:
        apply(lm, wrong)
    with pytest.raises(MinitxError) as caught:
        apply(lm, prune | wrong)
    assert str(caught.value) == str(alone.value), "the fault is kv_share's own"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": {"tmes": 1}}, "inner has no option 'tmes'; choose from preset, times,"),
        ({"inner": {"times": 1.5}}, "inner: times must be an integer; got 1.5."),
        ({"inner": {"times": True}}, "times must be an integer; got True"),
        ({"inner": {"mode": "c"}}, "must be one of a, b"),
        ({"inner": {"share": "x"}}, "must be a number or None"),
        ({"inner": {"share": float("nan")}}, "must be a number or None"),
        ({"inner": 3}, "inner must be True, False or a dict of options .*, got 3"),
        ({"iner": True}, "There is no technique 'iner'; did you mean 'inner'?"),
        ({"zzz": True}, "There is no technique 'zzz'; minitx list shows all of them."),
        ({"swallow": {"a": 1}}, "swallow has no option 'a'; it takes none."),
        ({"swallow": {"preset": "twice"}}, "swallow has no option 'preset'; it takes none."),
        (
            {"inner": {"preset": "twise"}},
            r"inner: preset must be one of default, twice, half \(did you mean 'twice'\?\); got "
            "'twise'.",
        ),
        ({"inner": {"preset": 2}}, "inner: preset must be one of default, twice, half; got 2."),
        ({"inner": {"preset": "twice", "times": "x"}}, "inner: times must be an integer; got 'x'."),
    ],
)
def test_bad_options_are_refused_in_one_sentence(made_up, options, message):
    with pytest.raises(MinitxError, match=message) as caught:
        apply(tiny_lm(), options)
    assert "\n" not in str(caught.value)
    assert not made_up  # nothing is put in before everything is checked


def test_numpy_numbers_are_converted(made_up):
    apply(tiny_lm(), {"inner": {"times": np.int64(2), "share": np.float32(0.5)}})
    name, times, _, share = made_up[0]
    assert (times, share) == (2, 0.5) and type(times) is int and type(share) is float
    with pytest.raises(MinitxError, match="inner: times must be an integer; got .*2.0"):
        apply(tiny_lm(), {"inner": {"times": np.float64(2)}})


def test_preset_stands_for_its_options_and_further_ones_override_them(made_up):
    inner = find("inner")
    assert inner.checked({"preset": "half"}) == {"share": 0.5, "mode": "b"}
    assert inner.checked({"mode": "a", "preset": "half"}) == {"share": 0.5, "mode": "a"}
    assert inner.checked({"preset": "default"}) == {}, "the defaults by their name"
    for words in (["preset=half", "share=1"], ["share=1", "preset=half"]):  # in any order
        assert inner.read(words) == {"share": 1.0, "mode": "b"}
    apply(tiny_lm(), {"inner": {"preset": "half"}})
    assert made_up == [("inner", 1, "b", 0.5)], "the technique sees options, no preset"
    assert inner.presets["half"] == {"share": 0.5, "mode": "b"}, "a preset is not changed by use"


def test_preset_is_explained_and_swept(made_up, capsys):
    assert main(["explain", "inner"]) == 0
    assert "preset=NAME" in (text := capsys.readouterr().out)
    assert "  half   share=0.5 mode=b\n" in text
    assert main(["explain", "inner", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["presets"]["twice"] == {"times": 2}
    inner = find("inner")
    assert settings(inner, ["preset=default,half", "times=2,3"]) == [
        {"preset": preset, "times": times} for preset in ("default", "half") for times in (2, 3)
    ]
    with pytest.raises(MinitxError, match="preset must be one of"):
        settings(inner, ["preset=half,halv"])


def test_options_are_parsed_from_words(made_up):
    read = find("inner").read
    assert read(["times=4", "mode=b", "share=0.5"]) == {"times": 4, "mode": "b", "share": 0.5}
    assert read(["share=None"]) == {"share": None}
    assert read(["share=2"]) == {"share": 2.0}
    assert type(find("inner").checked({"share": 2})["share"]) is float
    for words, message in (
        (["times"], "inner: expected times=VALUE, got 'times'"),
        (["times=x"], "inner: times must be an integer; got 'x'"),
        (["mode=c"], "inner: mode must be one of a, b; got 'c'"),
        (["colour=red"], "no option 'colour'"),
    ):
        with pytest.raises(MinitxError, match=message):
            read(words)
    flag = Option("flag", bool, False)
    assert flag.read("True") is True and flag.read("false") is False
    for wrong in ("yes", "1"):
        with pytest.raises(ValueError):
            flag.read(wrong)


def test_swap_visits_every_part_and_raises_without_any():
    lm = tiny_lm()
    numbered = wrap(lm, "ffn", lambda ffn, index: Wrapped(ffn, f"{index}"))
    assert [block.ffn.tag for block in numbered.model.stack.blocks] == ["0", "1"]
    assert numbered.model.stack.blocks[0].attn is lm.model.stack.blocks[0].attn
    with pytest.raises(MinitxError, match="no part of type Wrapped"):
        swap(lm, Wrapped, lambda node: node)
    assert swap(lm, Wrapped, lambda node: node, optional=True) is lm
    need(lm.model.stack.blocks[0].attn.qkv, QKV)
    with pytest.raises(MinitxError, match="no part of type FFN or SwiGLU"):
        need(lm.model.norm, FFN, SwiGLU)


def test_read_card_splits_at_headings():
    card = read_card(
        """One line
        that goes on.

        Paper: Someone, 2020.
            Section 2.
        Online: y = x: not a heading.
            Other: words stay.
        """
    )
    assert card.summary == "One line that goes on."
    assert card.sections == {
        "Paper": "Someone, 2020.\nSection 2.",
        "Online": "y = x: not a heading.\nOther: words stay.",
    }


# In Python and on the command line ---------------------------------------------------------------


@pytest.fixture
def toy(tmp_path, monkeypatch):
    tiny_folder(tmp_path / "toy")
    monkeypatch.chdir(tmp_path)


def test_load_applies_techniques(toy):
    dense = minitx.load("toy")
    lm = minitx.load("toy", fold_norms=True, fuse_projections={})
    assert "WeightlessRMSNorm" in repr(lm) and "FusedQKV" in repr(lm)
    assert "Weightless" not in repr(dense)
    assert_same(lm.logits([1, 2, 3]), dense.logits([1, 2, 3]), atol=1e-4)
    assert "Fused" not in repr(minitx.load("toy", fuse_projections=False))


def test_flags_may_be_anywhere(toy, capsys):
    for words in (
        ["generate", "--fold-norms", "Once", "-m", "toy", "-n", "5"],
        ["generate", "Once", "-m", "toy", "--fold-norms", "-n", "5", "--fuse-projections"],
        ["generate", "-m", "toy", "-n", "5", "--fold_norms", "--", "Once"],
    ):
        assert main([*words[:1], "-t", "0", *words[1:]]) == 0
        assert capsys.readouterr().out == f"Once{minitx.load('toy').generate('Once', 5)}\n"
    assert main(["show", "-m", "toy", "--fuse-projections"]) == 0
    assert "FusedQKV" in capsys.readouterr().out
    assert main(["generate", "-m", "toy", "-n", "1", "--", "--fold-norms"]) == 0
    assert capsys.readouterr().out.startswith("--fold-norms")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stories", "--fold-norms"], "stories takes no techniques; remove --fold-norms."),
        (["show", "-m", "toy", "--fold-norms", "a=1"], "fold_norms has no option 'a'"),
        (["show", "-m", "toy", "--fold-norms", "--fold-norms"], "--fold-norms is given twice"),
        (["show", "-m", "toy", "--fold-norm"], "There is no option --fold-norm"),
        (["explain", "fold-norm"], "no technique 'fold-norm'; did you mean 'fold_norms'?"),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(toy, capsys, words, message):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_list_and_explain(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^  (--[\w-]+)  ", out, re.M) == [t.flag for t in module.techniques()]
    assert re.search(r"^weights\n  --fold-norms +=  Fold each", out, re.M), "by level, = exact"
    assert main(["list", "--json"]) == 0
    assert {row["flag"] for row in json.loads(capsys.readouterr().out)} >= {"--fold-norms"}
    assert main(["explain", "fold-norms"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("--fold-norms (weights, exact)\n") and "arXiv 2407.09577" in text
    assert "File:      minitx/precompute/fold_norms.py\n" in text and "No options." in text
    assert "Letters:   B batch, T new tokens," in text and "Proof:     tests/precompute/" in text
    assert main(["explain", "sink-window"]) == 0
    text = capsys.readouterr().out
    assert "\n  sinks=4\n" in text and " (an integer, at least 0)\n" in text
    assert main(["explain", "fold_norms", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exact"] is True and found["options"] == {} and found["Fidelity"]


def test_inner_technique_is_refused_where_an_outer_one_was_made_for_what_it_found():
    """A saved model has its techniques already: what belongs inside them comes too late."""
    lm = tiny_lm(model=tiny_model(layers=4))
    shared = apply(lm, {"kv_share": {"first": 0}})
    for later in ("layer_fusion", "layer_merge", "layer_skip"):
        with pytest.raises(MinitxError, match=f"{later} must be applied before kv_share"):
            apply(shared, {later: True})
        options = {"drop": "3"} if later == "layer_skip" else {"first": 2, "size": 2}
        apply(lm, {"kv_share": {"first": 0, "size": 2}, later: options})  # both at once
    routed = apply(lm, {"head_router": {"first": 0}})
    with pytest.raises(MinitxError, match="quantize must be applied before head_router"):
        apply(routed, {"quantize": True})
    apply(routed, {"early_exit": True})  # a technique of an outer level still fits
