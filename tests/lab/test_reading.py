"""Measuring on any text: likelihoods against sums by hand, in windows, in pieces, step by step."""

import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from test_compare import story_lm
from tiny import END, TOKENIZER, tiny_lm

import minitx
from minitx.cli import main
from minitx.errors import MinitxError, MinitxWarning
from minitx.lab import reading
from minitx.lab.compare import Workload, compare, log_softmax
from minitx.lab.evaluate import (
    Profile,
    Tally,
    encode,
    evaluate,
    evaluate_model,
    evaluate_text,
    held_out,
    report,
    story_end,
)
from minitx.lab.reading import TextReport, hidden_as_generated, text_to_read
from minitx.model import Transformer
from minitx.technique import apply, wrap
from minitx.text import Text
from minitx.tree import Part, part

TEXT = Text("The balance of once and twice: a fence, a pond, and a stone. " * 20, "pond.txt")
IDS = TOKENIZER.encode(TEXT.content, special=False)
ONE_STEP = Workload(text=TEXT, tokens=100, prompts=2, rounds=1)


def by_hand(lm, count: int):
    """(nats, right tokens) of the first ``count`` tokens: windows of 48, the model's context."""
    nats, right = 0.0, 0
    for a in range(0, count, 48):
        targets = IDS[a : min(a + 48, count)]
        logits = lm.logits([END, *targets[:-1]])
        nats -= log_softmax(logits)[np.arange(len(targets)), targets].sum()
        right += (logits.argmax(-1) == targets).sum()
    return nats, right


# Reports -----------------------------------------------------------------------------------------


def test_likelihood_of_a_text_by_hand():
    lm = tiny_lm()
    found = evaluate_text(lm, TEXT, 100)
    nats, right = by_hand(lm, 100)
    assert found.tokens == 100 and found.accuracy == right / 100
    assert found.nats == pytest.approx(nats, rel=1e-6)
    assert found.loss == pytest.approx(nats / 100)
    assert found.perplexity == pytest.approx(math.exp(nats / 100))
    size = len(TOKENIZER.decode(IDS[:100]))
    assert found.bytes == size > 100, "two bytes are one token in places: 'on', 'ce'"
    assert found.nats_per_byte == pytest.approx(nats / size)
    assert f"{nats / size / math.log(2):.4f}" in str(found), "bits per byte"


def test_whole_text_is_read_if_it_has_fewer_tokens():
    lm = tiny_lm()
    assert evaluate_text(lm, TEXT, 10**6).tokens == len(IDS)
    short = evaluate_text(lm, "abc")
    assert (short.tokens, short.bytes) == (3, 3)


def test_model_without_start_token_predicts_all_but_the_first_token():
    lm = tiny_lm()
    bare = replace(lm.model.config, bos=None, eos=())
    lm = replace(lm, model=replace(lm.model, config=bare))
    found = evaluate_text(lm, TEXT, 100)
    logits = [lm.logits(IDS[a : min(a + 48, 99)]) for a in (0, 48, 96)]
    nats = -log_softmax(np.concatenate(logits))[np.arange(99), IDS[1:100]].sum()
    assert found.tokens == 99 and found.nats == pytest.approx(nats, rel=1e-6)
    assert found.bytes == len(TOKENIZER.decode(IDS[1:100])), "bytes of a token that is not scored"


def test_logits_in_pieces_give_the_same_report(monkeypatch):
    """A row of logits is as long as the vocabulary: only a few are in memory at a time."""
    lm = tiny_lm()
    whole = evaluate_text(lm, TEXT, 100), compare(lm, lm, "", ONE_STEP, bar=False).reading
    monkeypatch.setattr(reading, "PIECE", 5 * lm.model.config.vocab_size)
    sizes = [s.stop - s.start for s in reading.pieces(12, lm.model.config.vocab_size)]
    assert sizes == [5, 5, 2]
    pieces = evaluate_text(lm, TEXT, 100), compare(lm, lm, "", ONE_STEP, bar=False).reading
    for one, other in zip(whole, (pieces[0], pieces[1])):
        a, b = (r if isinstance(r, TextReport) else r.changed for r in (one, other))
        assert a.accuracy == b.accuracy and a.nats == pytest.approx(b.nats, rel=1e-6)


def test_depths_of_a_text_end_with_its_report():
    lm = tiny_lm()
    profile = evaluate_text(lm, TEXT, 100, depths=True)
    assert isinstance(profile, Profile) and len(profile.depths) == 2
    assert profile.depths[-1].nats == pytest.approx(evaluate_text(lm, TEXT, 100).nats, rel=1e-6)
    assert "1 of 2" in str(profile) and "perplexity" in str(profile)


# As generated ------------------------------------------------------------------------------------


def test_technique_that_decides_per_step_is_read_as_generation_runs_it(monkeypatch):
    """LazyLLM keeps the tokens that the last token of a step attends to."""
    lm, ids = apply(tiny_lm(), {"lazy_tokens": {"keep": 0.5}}), [END, *IDS[:45]]
    state = lm.model.new_state()
    state.prompt = 32
    steps = [lm.model.hidden(ids[:32], state)]
    steps += [lm.model.hidden([token], state) for token in ids[32:]]
    states, new_state = [], Transformer.new_state
    monkeypatch.setattr(
        Transformer, "new_state", lambda model: states.append(new_state(model)) or states[-1]
    )
    np.testing.assert_array_equal(hidden_as_generated(lm, ids), np.concatenate(steps))
    assert states[0].prompt == 32, "the state does not know where the prompt ends"
    monkeypatch.undo()
    assert not np.allclose(hidden_as_generated(lm, ids), lm.model.hidden(ids)), "no difference"


def test_technique_that_decides_per_sequence_is_read_in_two_steps():
    @part
    class Counted(Part):
        decides = "sequence"
        inner: Part
        sizes: list

        def __call__(self, x, layer):
            self.sizes.append(len(x))
            return self.inner(x, layer)

    sizes = []
    lm = wrap(tiny_lm(), "ffn", lambda ffn, i: Counted(ffn, sizes) if i == 0 else ffn)
    found = hidden_as_generated(lm, [END, *IDS[:45]])
    assert sizes == [32, 14], "the prompt decides; what follows may run at once"
    assert len(found) == 46
    hidden_as_generated(lm, IDS[:20])
    assert sizes[2:] == [20], "a text that is shorter than a prompt is one step"


def test_evaluate_reads_stories_as_generation_runs_them():
    lm = apply(story_lm(context=512), {"lazy_tokens": {"keep": 0.3}})
    found, batched = evaluate_model(lm, 2), evaluate(lm, lm.tokenizer, held_out(lm, 2))
    total = Tally.empty()
    for story in encode(lm.tokenizer, held_out(lm, 2)):
        logits = reading.logits_of(lm, hidden_as_generated(lm, story.ids[:-1]))
        total.add(logits, np.array(story.ids[1:]), np.array(story.kinds))
    assert found.loss == pytest.approx(report(total).loss, rel=1e-6)
    assert found.loss != pytest.approx(batched.loss, rel=1e-6), "one pass is another computation"


# Comparing ---------------------------------------------------------------------------------------


def test_compare_on_text_measures_and_continues_it():
    dense, changed = tiny_lm(), apply(tiny_lm(), {"layer_skip": {"drop": "0"}})
    found = compare(dense, changed, "--layer-skip", ONE_STEP, bar=False)
    r = found.reading
    assert r.tokens == r.dense.tokens == 100
    assert r.dense.nats == pytest.approx(by_hand(dense, 100)[0], rel=1e-6)
    assert r.changed.nats == pytest.approx(by_hand(changed, 100)[0], rel=1e-6)
    assert r.added_loss == r.changed.loss - r.dense.loss
    assert found.generation.prompts == 2 and found.generation.prompt_tokens == 32
    text = str(found)
    assert "Measured on pond.txt, 100 tokens in windows of 48." in text and "bits per byte" in text
    assert max(map(len, text.splitlines()[4:])) <= 100
    found = json.loads(json.dumps(found.as_dict()))
    assert found["reading"]["changed"]["bits_per_byte"] > 0


def test_identical_models_agree_on_text():
    lm = tiny_lm()
    found = compare(lm, apply(lm, {"fold_norms": True}), "", ONE_STEP, bar=False)
    assert found.identical and found.reading.divergence < 1e-9


# Stories and models that do not know them --------------------------------------------------------


def test_model_that_does_not_know_stories_is_told_to_use_text():
    """The weights are random, so the loss is near log V, far above the entropy."""
    lm = story_lm()
    words = "stories, which this model does not know.*--text FILE"
    with pytest.warns(MinitxWarning, match=words):
        compare(lm, lm, "", Workload(stories=1, prompts=1, rounds=1), bar=False)
    with pytest.warns(MinitxWarning, match=words):
        evaluate_model(lm, 1)


def test_shipped_model_on_stories_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error", MinitxWarning)
        evaluate_model(minitx.load("stories-draft"), 1)


def test_stories_of_a_model_without_their_end_token_begin_with_its_own():
    """A tokenizer without <|endoftext|>, whose tokens also reach across answers."""
    lm = replace(tiny_lm(), tokenizer=Spaced())
    assert story_end(lm) == END
    (story,) = held_out(lm, 1)
    (encoded,) = encode(lm.tokenizer, [story], end=END)
    ids = lm.tokenizer.encode(story.text, special=False)
    assert encoded.ids == [END, *ids, END] and set(encoded.kinds) == {0}
    assert encoded.nats == story.nats
    bare = replace(lm.model.config, bos=None, eos=())
    with pytest.raises(MinitxError, match="this model has none; measure it on text: --text FILE"):
        story_end(replace(lm, model=replace(lm.model, config=bare)))


def test_every_story_is_encoded_once_by_a_tokenizer_that_reaches_across_answers():
    lm = replace(tiny_lm(), tokenizer=Spaced())
    read = held_out(lm, 3)
    found = encode(lm.tokenizer, read, end=END)
    assert [e.ids[1:-1] for e in found] == [lm.tokenizer.encode(s.text) for s in read]
    cut = encode(lm.tokenizer, read, 10, end=END)
    assert [len(e.kinds) for e in cut] == [10, 10, 10] and 0 < cut[0].nats < found[0].nats


class Spaced:
    """Puts a space before every text (as SentencePiece does), and has no special tokens."""

    vocab_size = 256
    bos = eos = None

    def encode(self, text, special=True):
        return list(f" {text}".encode())

    def decode(self, ids):
        return bytes(ids).decode()


# The commands ------------------------------------------------------------------------------------


def test_commands_measure_on_text(run, workdir):
    (workdir / "pond.txt").write_text(TEXT.content)
    measured = "--text", "pond.txt", "--tokens", "60"
    status, out, err = run("evaluate", "-m", "toy", *measured)
    assert status == 0 and out.startswith("60 tokens, ") and err == "", "no bar into a pipe"
    status, out, _ = run("evaluate", "-m", "toy", "--layer-skip", "drop=1", *measured, "--json")
    assert json.loads(out)["tokens"] == 60
    status, out, _ = run("compare", "-m", "toy", "--fold-norms", *measured)
    assert status == 0 and "Measured on pond.txt, 60 tokens in windows of 48." in out
    status, out, _ = run("sweep", "layer-skip", "drop=0,1", "-m", "toy", *measured)
    assert status == 0 and out.splitlines()[2].startswith("drop=0")
    assert "hop" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--text", "none.txt"), "none.txt: there is no such file"),
        (("--text", "."), "is a folder"),
        (("--text", "pond.txt", "--stories", "3"), "--stories has no effect"),
        (("--text", "pond.txt", "--grade", "full"), "--grade has no effect"),
        (("--tokens", "3"), "--tokens has no effect here: it needs --text"),
    ],
)
def test_misplaced_options_are_refused(run, workdir, words, message):
    (workdir / "pond.txt").write_text(TEXT.content)
    for command in (("evaluate",), ("compare",), ("sweep", "layer-skip")):
        status, _, err = run(*command, "-m", "toy", *words)
        assert status == 2 and message in err and len(err.splitlines()) == 1, command


def test_text_needs_two_tokens_and_a_tokenizer():
    with pytest.raises(MinitxError, match="tokens must be an integer >= 2, got 1"):
        text_to_read(tiny_lm(), TEXT, 1)
    with pytest.raises(MinitxError, match="no tokenizer"):
        evaluate_text(tiny_lm(tokenizer=None), TEXT)
    assert main(["evaluate", "--text", "README.md", "--tokens", "0"]) == 2
