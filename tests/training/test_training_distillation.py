"""Distillation: the loss and its gradient, the teacher's text, a run with a teacher, faults."""

import math
from dataclasses import fields

import numpy as np
import pytest
from differences import check, draw
from test_training import FIRST, MODEL, TOKENIZER, recipe_of, worker_of, write

from minitx.build import random_model
from minitx.checkpoints.huggingface import write_model
from minitx.checkpoints.tokenizer_json_write import write_tokenizer
from minitx.errors import MinitxError
from minitx.lm import load
from minitx.training import distillation
from minitx.training.data import PADDING, end_id
from minitx.training.distillation import TextArrays, distillation_loss, teacher_loss
from minitx.training.recipe import Stage, Teacher, recipe_from
from minitx.training.stories import split_of
from minitx.training.train import train
from minitx.training.worker import SharedArrays, Worker

ONE = np.ones(1)


def lesson(folder, **changes):
    """A stage with a teacher: rows of at most 20 tokens."""
    teacher = {"model": str(folder), "rows": 130, "prompt": [3, 9]}
    teacher |= {"temperatures": [1, 0.1], "weights": [1, 0.3]}
    stage = FIRST | {"name": "lesson", "row": 20, "answer_weight": 1}
    return stage | {"teacher": teacher | changes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with the vocabulary of the stories, as a teacher."""
    path = tmp_path_factory.mktemp("teacher")
    config = recipe_from(recipe_of(FIRST)).config(len(TOKENIZER), end_id(TOKENIZER))
    write_model(random_model(config, 7), path, "F32")
    write_tokenizer(TOKENIZER, path)
    return path


def worker_with_text(stage) -> Worker:
    """The only worker of a run, which has written the text of its stage."""
    worker = worker_of(recipe_of(FIRST))
    worker.recipe = recipe_from(recipe_of(stage))
    worker.text_arrays = TextArrays.for_recipe(worker.recipe)
    worker.enter_stage(0)
    return worker


# The loss ----------------------------------------------------------------------------------------


def test_low_temperature_shows_which_token_is_ahead():
    # Two tokens of 0.6 and 0.4: their ratio is 1.5. At t = 0.5 it is 1.5^2 = 2.25, so the
    # probabilities are 2.25 / 3.25 = 0.6923 and 0.3077. The model has 0.5 and 0.5 at every t:
    #   t = 1:    0.6 ln(0.6 / 0.5) + 0.4 ln(0.4 / 0.5)                 = 0.02014
    #   t = 0.5:  0.6923 ln(0.6923 / 0.5) + 0.3077 ln(0.3077 / 0.5)     = 0.07591
    teacher, even = np.log([[0.6, 0.4]]), np.zeros((1, 2))
    assert distillation_loss(even, teacher, 1.0, ONE) == pytest.approx(0.02014, abs=1e-5)
    assert distillation_loss(even, teacher, 0.5, ONE) == pytest.approx(0.07591, abs=1e-5)
    # Gradient at t = 0.5: (0.5 - 0.6923) / 0.5 = -0.3846 for the better token: raise it.
    check(lambda x: distillation_loss(x, teacher, 0.5, ONE), even)


def test_distillation_loss_gradient_and_weights():
    x, teacher, w = draw(2, 3, 5), draw(2, 3, 5, seed=1), draw(2, 3, seed=2, low=0.1)
    w[1, 2] = 0
    check(lambda x: distillation_loss(x, teacher, 1.0, w), x)
    check(lambda x: distillation_loss(x, teacher, 0.25, w), x)
    each = [distillation_loss(x[i], teacher[i], 0.25, w[i]) for i in (0, 1)]
    assert distillation_loss(x, teacher, 0.25, w) == pytest.approx(sum(each), rel=1e-12)
    assert distillation_loss(teacher + 3, teacher, 0.1, w) == pytest.approx(0, abs=1e-12)
    assert distillation_loss(1e4 * x, 1e4 * teacher, 0.1, w) < math.inf, "no overflow"


# The text ----------------------------------------------------------------------------------------


def test_rows_are_beginnings_of_training_stories_and_greedy_text(folder):
    worker = worker_with_text(lesson(folder))
    text, lm = worker.text, load(folder)
    assert text.ids.shape == (130, 21) and [len(g) for g in text.groups()] == [128, 2]
    assert (text.ids[:, 0] == end_id(TOKENIZER)).all(), "a story follows <|endoftext|>"
    for row, length in ((0, 3), (5, 3), (129, 9)):
        ids = text.ids[row].tolist()
        written = lm.generate(ids[:length], 21 - length)
        expected = [*written, *[end_id(TOKENIZER)] * 21][: 21 - length]
        assert ids[length:] == expected, f"row {row} is not what greedy decoding writes"
        logits = text.model.head(text.hidden[row])
        np.testing.assert_allclose(logits, lm.model(text.ids[row, :-1]), rtol=1e-4, atol=1e-5)


def test_prompts_are_of_the_training_split(folder, monkeypatch):
    seen = []
    sample = distillation.sample_stories

    def recording(*arguments):
        seen.extend(sample(*arguments))
        return seen[-len(arguments[-1]) :]

    monkeypatch.setattr(distillation, "sample_stories", recording)
    worker = worker_with_text(lesson(folder))
    assert len(seen) == 130 and {split_of(story.text) for story in seen} == {"train"}
    for row, length in ((0, 3), (129, 9)):  # of the shortest and of the longest prompt
        ids = worker.text.ids[row].tolist()
        story = [end_id(TOKENIZER), *TOKENIZER.encode(seen[row].text, special=False)]
        assert ids[:length] == story[:length], "the prompt is not the story's beginning"


def test_tokens_after_the_end_of_a_text_are_padding(folder):
    worker = worker_with_text(lesson(folder))
    end = end_id(TOKENIZER)
    worker.text.ids[:, 5:] = end  # every text ends at position 5
    batch, logits = worker.text.batch(0, range(4))
    assert batch.ids.shape == (4, 6) and logits.shape == (4, 5, len(TOKENIZER))
    assert (batch.kinds != PADDING).all(), "the end itself is a target"
    worker.text.ids[:, 4] = np.where(np.arange(130) % 2, end, 1)  # half of them at position 4
    batch, _ = worker.text.batch(0, range(16))
    ended = batch.ids[:, 4] == end
    assert 0 < ended.sum() < 16
    assert (batch.weights[ended, 4] == 0).all() and (batch.weights[~ended] == 1).all()


# A run -------------------------------------------------------------------------------------------


def test_teacher_has_nothing_to_teach_itself_and_losses_add_up_by_weight(folder):
    worker = worker_with_text(lesson(folder))
    batch, logits = worker.text.batch(0, range(8))
    teacher = worker.recipe.stages[0].teacher
    assert teacher_loss(load(folder).model, batch, logits, teacher) == pytest.approx(0, abs=1e-3)
    found = worker.model(batch.ids[:, :-1])
    one, low = (distillation_loss(found, logits, t, batch.weights) for t in (1, 0.1))
    assert teacher_loss(worker.model, batch, logits, teacher) == pytest.approx(one + 0.3 * low)
    loss, tokens = worker.step(0, 0, 0)
    assert loss == pytest.approx((one + 0.3 * low) / batch.weights.sum(), rel=1e-4)
    assert loss > 0.01 and tokens == (batch.kinds != PADDING).sum()


def test_model_comes_closer_to_its_teacher(folder):
    worker = worker_with_text(lesson(folder) | {"steps": 12, "lr": 0.02})
    losses = [worker.step(0, step, step)[0] for step in range(12)]
    assert np.mean(losses[-3:]) < 0.7 * losses[0]


def test_distillation_is_bit_identical_for_any_workers_and_interruptions(folder, tmp_path):
    path = write(tmp_path, recipe_of(lesson(folder) | {"steps": 3}))
    train(path, tmp_path / "two", workers=2, bar=False)
    stopped = train(path, tmp_path / "one", workers=1, time_limit=0, bar=False)
    assert not stopped["finished"]
    train(path, tmp_path / "one", workers=1, bar=False)  # which writes the text again
    with np.load(tmp_path / "two" / "checkpoint.npz") as a:
        with np.load(tmp_path / "one" / "checkpoint.npz") as b:
            for name in ("weights", "m", "v"):
                np.testing.assert_array_equal(a[name], b[name])


def test_text_of_a_run_has_room_for_its_longest_stage(folder):
    short, long = lesson(folder, rows=4), lesson(folder, rows=2) | {"name": "b", "row": 50}
    recipe = recipe_from(recipe_of(short, long, FIRST))
    found = TextArrays.for_recipe(recipe)
    assert (len(found.ids), len(found.hidden)) == (2 * 51, 2 * 50 * MODEL["width"])
    assert not len(SharedArrays(10, 1).text.ids), "nothing without a teacher"


# Faults ------------------------------------------------------------------------------------------


def test_teacher_is_read_with_its_defaults():
    stage = FIRST | {"teacher": {"model": "stories"}, "row": 120, "answer_weight": 1}
    recipe = recipe_from(recipe_of(stage, model=MODEL | {"context": 120}))
    assert recipe.stages[0].teacher == Teacher("stories", (1.0,), (1.0,), 2048, (4, 120))
    assert recipe_from(recipe.as_dict()) == recipe


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"teacher": 3}, "an object with model, temperatures"),
        ({"teacher": {}}, "must have the field 'model'"),
        ({"model": "storys"}, "Stage 'lesson': the teacher cannot be loaded: "),
        ({"model": 3}, "the name or the folder of a model"),
        ({"temperature": 1}, "did you mean 'temperatures'"),
        ({"temperatures": []}, "at least one temperature"),
        ({"temperatures": [1, 0]}, "from 0.001 to 1000"),
        ({"temperatures": [1]}, "must have as many weights as temperatures (1), got 2"),
        ({"weights": [1, -1]}, "numbers from 0 to 1000"),
        ({"weights": [0, 0.0]}, "at least one above 0"),
        ({"rows": 0}, "integer >= 1"),
        ({"rows": True}, "integer >= 1"),
        ({"prompt": [5]}, "list of two integers"),
        ({"prompt": [9, 5]}, "[shortest, longest], got [9, 5]"),
        ({"prompt": [2, 21]}, "at most the row (20), got 21"),
        ({"chain": True}, "chain must be false, got True"),
        ({"answer_weight": 5}, "answer_weight must be 1.0, got 5"),
        ({"layer_dropout": 0.1}, "layer_dropout must be 0.0"),
        ({"early_exit": {"scale": 1, "rotation": 2}}, "early_exit must be null"),
        ({"hops": [1]}, "hops must be null"),
        ({"layers": 1}, "layers must be null"),
        ({"detector": {"k": 2}}, "detector must be null"),
    ],
)
def test_fault_of_a_teacher_is_named(folder, changes, words):
    stage = lesson(folder)
    if set(changes) <= {f.name for f in fields(Stage)}:
        stage |= changes
    else:
        stage["teacher"] |= changes
    with pytest.raises(MinitxError) as caught:
        recipe_from(recipe_of(stage))
    message = str(caught.value)
    assert words in message and "\n" not in message


def test_teacher_of_another_vocabulary_is_refused(folder, tmp_path, monkeypatch):
    config = recipe_from(recipe_of(FIRST)).config(len(TOKENIZER) + 2, end_id(TOKENIZER))
    write_model(random_model(config, 7), tmp_path, "F32")
    write_tokenizer(TOKENIZER, tmp_path)
    with pytest.raises(MinitxError, match="1022 tokens, got 1024; use a teacher"):
        recipe_from(recipe_of(lesson(tmp_path)))
    wide = recipe_of(lesson(folder) | {"row": 63}, model=MODEL | {"context": 80})
    recipe_from(wide)
    wide["stages"][0]["row"] = 64
    with pytest.raises(MinitxError, match="context of the teacher, which is 64, since .*; got 64"):
        recipe_from(wide)
    monkeypatch.setattr(distillation, "MAX_HIDDEN", 130 * 20 * 16 - 1)
    with pytest.raises(MinitxError, match="use fewer rows or shorter ones"):
        recipe_from(recipe_of(lesson(folder)))
