"""What techniques calibrate on (stories, a text, or ids), what is remembered and warned of."""

import json
import warnings

import numpy as np
import pytest
from same import assert_same
from tiny import END, TOKENIZER, tiny_lm, tiny_model

import minitx
from minitx import calibration
from minitx.calibration import Calibrated, calibration_ids
from minitx.checkpoints.precomputed import signature
from minitx.cli import main
from minitx.errors import MinitxError, MinitxWarning
from minitx.lab.compare import Workload, compare
from minitx.skip.ffn_skip.calibration import calibrate as calibrate_ffn_skip
from minitx.technique import apply, techniques
from minitx.text import Text
from minitx.training.stories import stories

TEXT = Text("The balance of once and twice: a fence, a pond, a stone. " * 60, "pond.txt")
IDS = TOKENIZER.encode(TEXT.content, special=False)
FOUR = {"prune": {"stories": 4}}


def pruned(**options):
    return apply(tiny_lm(), FOUR, **options).model.stack.blocks[0].ffn.down.w


def asked(monkeypatch, wanted: dict, **options) -> list[list[int]]:
    """The ids on which ``prune`` calibrates."""
    found = []
    real = calibration.calibration_ids
    monkeypatch.setattr(
        "minitx.precompute.prune.calibration_ids",
        lambda *args: found.extend(real(*args)) or found,
    )
    apply(tiny_lm(), wanted, **options)
    return found


# Sources -----------------------------------------------------------------------------------------


def test_default_is_stories_that_fit_the_context():
    texts = calibration_ids("test", tiny_lm(), 2)
    assert [len(ids) for ids in texts] == [48, 48] and texts[0][0] == END


def test_more_stories_begin_with_the_same_ones():
    lm = tiny_lm()
    few, more = calibration_ids("test", lm, 3), calibration_ids("test", lm, 9)
    assert len(more) == 9 and more[:3] == few == calibration_ids("test", lm, 3)
    first = stories("calibration", "full", 0)
    assert more == [lm.tokenizer.encode(next(first).text)[:48] for _ in range(9)]


def test_text_is_cut_into_as_many_passages_as_stories_were_wanted(monkeypatch):
    found = asked(monkeypatch, FOUR, calibrate=TEXT)
    # The context is 48: <|endoftext|>, as before every prompt, and 47 tokens of the text.
    assert found == [[END, *IDS[47 * i : 47 * (i + 1)]] for i in range(4)]
    assert asked(monkeypatch, FOUR, calibrate=TEXT.content) == found, "a plain str is the same text"


def test_ids_are_used_as_they_are_and_cut_at_the_context(monkeypatch):
    assert asked(monkeypatch, FOUR, calibrate=[[5, 6, 7], [8, 9]]) == [[5, 6, 7], [8, 9]]


def test_one_list_of_ids_is_cut_into_passages(monkeypatch):
    assert asked(monkeypatch, FOUR, calibrate=np.array(IDS)) == [
        IDS[48 * i : 48 * (i + 1)] for i in range(4)
    ]


def test_calibrating_on_another_text_gives_another_model_and_stories_stay_the_default():
    assert not np.array_equal(pruned(), pruned(calibrate=TEXT))
    assert_same(pruned(), pruned())


def test_model_without_tokenizer_calibrates_on_ids_and_refuses_text():
    lm = tiny_lm(tokenizer=None)
    found = apply(lm, {"prune": {"stories": 1}}, calibrate=[IDS[:40]])
    assert found.calibrated[0].amount == "the given ids, 40 tokens"
    with pytest.raises(MinitxError, match="prune learns.*no tokenizer.*method=magnitude"):
        apply(lm, FOUR)
    with pytest.raises(MinitxError, match="no tokenizer"):
        apply(lm, FOUR, calibrate="some text")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "has 0 tokens; expected a text of at least 2"),
        (3, "calibrate must be a text or token ids"),
        (b"text", "calibrate must be a text or token ids"),
        ([], "at least one token"),
        ([[]], "at least one token"),
        ([1], "at least 2 token ids"),
        ([1, 5000], "outside the vocabulary"),
        ([1, -1], "outside the vocabulary"),
        ([[1, 2], [3.5, 4.0]], "integer token ids"),
        ([["a", "b"]], "integer token ids"),
        ([[[1, 2]]], "array of shape"),
        ([1, [2, 3]], "rows of different lengths"),
    ],
)
def test_bad_calibration_is_refused_in_one_sentence(given, words):
    with pytest.raises(MinitxError, match=words) as found:
        apply(tiny_lm(), FOUR, calibrate=given)
    assert "\n" not in str(found.value) and len(str(found.value)) < 300


ONLY_RELU = ("contextual_sparsity", "negative_predict", "negative_skip")


def test_every_technique_that_calibrates_takes_the_text_that_is_given():
    """Those with an option ``stories``, and those whose number of texts is fixed."""
    settings = {t.name: {} for t in techniques() if "stories" in t.options}
    settings |= {"dota": {"fit": "post-hoc"}, "early_exit": {"measure": "probe"}}
    settings["quantize"], settings["lut_product"] = {"awq": True}, {"search": True, "drop": 1.0}
    settings["negative_skip"] = {"center": True}
    assert len(settings) >= 9
    # Five layers, so that there is a choice of neighbouring ones.
    llama, relu = (tiny_lm(model=tiny_model(family, layers=5)) for family in ("llama", "gpt2"))
    for name, options in settings.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MinitxWarning)  # dota wants more than there is
            lm = relu if name in ONLY_RELU else llama
            found = apply(lm, {name: options}, calibrate=TEXT)
        assert [(use.technique, use.source) for use in found.calibrated] == [(name, "pond.txt")]


def test_ffn_skip_calibrates_on_what_the_model_carries():
    lm = apply(tiny_lm(), {}, calibrate=TEXT)
    texts = calibration_ids("test", lm, 16)
    expected = calibrate_ffn_skip(lm, texts, 0.0, warm_up=5)
    assert calibrate_ffn_skip(lm, None, 0.0, warm_up=5) == expected


# What is remembered ------------------------------------------------------------------------------


def test_model_remembers_what_it_was_calibrated_on():
    lm = apply(tiny_lm(), FOUR, calibrate=TEXT)
    assert lm.calibrated == (Calibrated("prune", "pond.txt", "pond.txt, 4 passages, 192 tokens"),)
    assert str(lm.calibrated[0]) == "prune calibrated on pond.txt, 4 passages, 192 tokens"
    again = apply(lm, {"elsa": {"stories": 2}})
    assert [use.technique for use in again.calibrated] == ["prune", "elsa"]
    assert again.calibrated[1].source == "pond.txt", "the source stays with the model"
    assert tiny_lm().calibrated == (), "the dense model is untouched"
    (use,) = apply(tiny_lm(), FOUR).calibrated
    assert str(use) == "prune calibrated on 4 stories (grade full, calibration split)"


def test_show_and_precompute_say_it_and_it_survives_loading(run, workdir):
    (workdir / "pond.txt").write_text(TEXT.content)
    line = "prune calibrated on pond.txt, 4 passages, 192 tokens"
    flags = "--prune", "stories=4"
    status, _, err = run("precompute", "out", "-m", "toy", "--calibrate", "pond.txt", *flags)
    assert status == 0 and line in err
    status, _, err = run("show", "-m", "out")
    assert status == 0 and err.splitlines()[-1] == line
    status, out, _ = run("show", "-m", "toy", "--calibrate", "pond.txt", *flags, "--json")
    assert json.loads(out)["calibrated"] == [line]
    assert minitx.load("out").calibrated[0].source == "pond.txt"


@pytest.mark.parametrize("wrong", ["x", [3], [{"technique": "prune"}], [{"a": 1}], {"a": "b"}])
def test_damaged_note_of_calibration_is_reported(run, workdir, wrong):
    assert run("precompute", "out", "-m", "toy", "--fold-norms")[0] == 0
    path = workdir / "out" / "precomputed.json"
    content = json.loads(path.read_text()) | {"calibrated": wrong}
    path.write_text(json.dumps(content | {"fingerprint": signature(content)}))
    status, _, err = run("show", "-m", "out")
    assert status == 2 and "'calibrated' must be a list" in err and len(err.splitlines()) == 1


# Warnings ----------------------------------------------------------------------------------------


def test_general_model_calibrated_on_stories_is_warned_of_once():
    """The random model never learned stories: its loss is far above their entropy."""
    with pytest.warns(MinitxWarning, match="--calibrate FILE") as found:
        apply(tiny_lm(), FOUR | {"elsa": True})
    assert len(found) == 1 and "prune is calibrated on stories" in str(found[0].message)


def test_shipped_model_calibrated_on_stories_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error", MinitxWarning)
        minitx.load("stories-draft", prune={"stories": 1})
        apply(tiny_lm(), FOUR, calibrate=TEXT)


def test_short_text_and_useless_calibration_are_said():
    with pytest.warns(MinitxWarning, match="prune would calibrate on 500 passages.*has only 63"):
        apply(tiny_lm(), {"prune": {"stories": 500}}, calibrate=TEXT)
    with pytest.warns(MinitxWarning, match="fold_norms does not calibrate"):
        apply(tiny_lm(), {"fold_norms": True}, calibrate=TEXT)


def test_setting_measured_on_other_text_than_it_was_calibrated_on_says_so():
    dense = tiny_lm()
    work = Workload(text=TEXT, tokens=60, prompts=1, rounds=1)
    on_stories = apply(dense, FOUR)
    with pytest.warns(MinitxWarning, match="on 4 stories .* measured on pond.txt, another kind"):
        found = compare(dense, on_stories, "--prune", work, bar=False)
    assert "Prune calibrated on 4 stories" in str(found)
    same = apply(dense, FOUR, calibrate=TEXT)
    with pytest.warns(MinitxWarning, match="on pond.txt.* on which it is measured too"):
        compare(dense, same, "--prune", work, bar=False)


def test_command_line_notes_come_once(run, workdir):
    status, _, err = run("show", "-m", "toy", "--prune", "--elsa", "--low-rank")
    assert status == 0 and err.count("minitx: note:") == 1


# Work that is done once --------------------------------------------------------------------------


def test_sweep_of_another_option_fits_once(monkeypatch):
    """``remembered``: by the model, the ids and the settings that the work depends on."""
    made = []
    lm, other = tiny_lm(), tiny_lm("gpt2")
    for model, texts, settings in (
        (lm, [[1, 2]], (4,)),
        (lm, [[1, 2]], (4,)),  # the same
        (lm, [[1, 3]], (4,)),
        (lm, [[1, 3]], (5,)),
        (other, [[1, 3]], (5,)),
    ):
        calibration.remembered("made up", model, texts, settings, lambda: made.append(1))
    assert len(made) == 4


def test_main_refuses_two_texts_on_stdin(capsys):
    assert main(["compare", "--prune", "--text", "-", "--calibrate", "-"]) == 2
    assert "Only one of --text and --calibrate" in capsys.readouterr().err


def test_message_without_a_tokenizer_lists_what_to_do():
    for instead, end in (("", "PATH, or give calibrate= token ids."), ("use x", "ids, or use x.")):
        with pytest.raises(MinitxError) as caught:
            calibration_ids("prune", tiny_lm(tokenizer=None), 1, instead)
        assert str(caught.value).endswith(end)
