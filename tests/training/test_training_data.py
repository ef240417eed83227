"""Training batches: their content, loss weights, and that each row can be computed alone."""

import hashlib
from itertools import islice

import numpy as np
import pytest

from minitx.checkpoints.tokenizer_json import read_tokenizer
from minitx.checkpoints.tokenizer_json_write import write_tokenizer
from minitx.errors import MinitxError
from minitx.training.data import (
    END,
    KIND_NUMBER,
    PADDING,
    StoryDataset,
    StoryEncoder,
    as_uniform,
    end_id,
    hash_integers,
    pick_by_share,
    sample_stories,
    story_tokenizer,
)
from minitx.training.stories import GRADES, KINDS, stories

TOKENIZER = story_tokenizer()


def rows(**changes):
    options = dict(grades={"one_hop": 1}, row_length=96, seed=5, answer_weight=8.0)
    return StoryDataset(TOKENIZER, **options | changes)


@pytest.mark.parametrize("grade", GRADES)
def test_encoding_by_pieces_equals_encoding_the_text(grade):
    encoder = StoryEncoder(TOKENIZER)
    for story in islice(stories("train", grade, 3), 40):
        ids, kinds, _ = encoder.story(story)
        assert ids == [*TOKENIZER.encode(story.text, special=False), encoder.end]
        assert [encoder.end, *ids[:-1]] == TOKENIZER.encode(story.text)  # as a prompt is encoded
        found = [TOKENIZER.decode([i]).strip() for i, kind in zip(ids, kinds) if kind]
        assert found == [answer.value for answer in story.answers]
        assert [k for k in kinds if k] == [KIND_NUMBER[a.kind] for a in story.answers]


@pytest.mark.parametrize("chain", [True, False])
def test_row_is_the_same_alone_and_in_a_batch(chain):
    made = rows(chain=chain)
    whole = made.batch(3, 0, 8)
    for first, last in ((0, 1), (2, 5), (7, 8)):
        part = rows(chain=chain).batch(3, first, last)
        for a, b in zip(part, whole):
            np.testing.assert_array_equal(a, b[first:last])


def test_rows_differ_by_step_index_and_seed():
    ids = [rows(seed=s).batch(t, 0, 3).ids for s in (0, 1) for t in (0, 1)]
    found = {row.tobytes() for batch in ids for row in batch}
    assert len(found) == 12


def test_chained_row_is_filled_with_stories():
    made = rows(grades={"one_hop_tiny": 1}, row_length=128)
    batch = made.batch(0, 0, 4)
    assert batch.ids.shape == (4, 129) and batch.kinds.shape == batch.weights.shape == (4, 128)
    for ids in batch.ids:
        assert ids[0] == TOKENIZER.eos
        texts = TOKENIZER.decode(ids).split(END)  # decode drops the first
        assert len(texts) > 2
        assert all(text.startswith("One day") and text.endswith("The end.") for text in texts[:-1])
    assert (batch.weights > 0).all()


def test_unchained_row_is_one_story_and_padding():
    made = rows(grades={"one_hop_tiny": 1}, row_length=128, chain=False)
    batch = made.batch(0, 0, 4)
    for row in range(4):
        story = made.story(0, row, 0)
        n = len(TOKENIZER.encode(story.text))
        assert TOKENIZER.decode(batch.ids[row, : n + 1]) == story.text + END
        assert (batch.kinds[row, n:] == PADDING).all() and (batch.kinds[row, :n] >= 0).all()
    trimmed = batch.trimmed()
    used = (batch.kinds != PADDING).any(0).sum()
    assert trimmed.ids.shape == (4, used + 1) and trimmed.weights.shape == (4, used)
    assert trimmed.weights.sum() == batch.weights.sum()


def test_loss_weights_by_kind():
    batch = rows(chain=False, row_length=110).batch(0, 0, 16)
    assert (batch.weights[batch.kinds == PADDING] == 0).all()
    assert (batch.weights[batch.kinds == 0] == 1).all()
    assert (batch.weights[batch.kinds > 0] == 8).all()
    assert {PADDING, 0, KIND_NUMBER["where1"]} <= set(batch.kinds.ravel().tolist())


def test_long_story_is_truncated():
    batch = rows(grades={"full": 1}, row_length=20, chain=False).batch(0, 0, 4)
    assert batch.ids.shape == (4, 21) and (batch.kinds != PADDING).all()


def test_stories_are_sampled_by_share_of_grades():
    drawn = sample_stories({"set_phrases": 1, "one_hop_tiny": 3}, "train", 1, range(400))
    tiny = sum(story.text.startswith("One day") and "?" in story.text for story in drawn)
    assert abs(tiny / 400 - 0.75) < 0.08
    again = sample_stories({"set_phrases": 1, "one_hop_tiny": 3}, "train", 1, range(7, 9))
    assert again == drawn[7:9]


def test_pick_by_share_inverts_the_cumulative_shares():
    shares = [("a", 1.0), ("b", 2.0), ("c", 1.0)]
    assert [pick_by_share(shares, w) for w in (0, 0.2, 0.25, 0.7, 0.75, 0.9999)] == list("aabbcc")


def test_hash_integers_flips_half_of_the_bits_and_is_uniform():
    changes = [
        (hash_integers(3, a, b) ^ hash_integers(3, a, b ^ 1 << bit)).bit_count()
        for a in range(8)
        for b in range(8)
        for bit in range(16)
    ]
    assert 31.5 < np.mean(changes) < 32.5 and min(changes) > 8
    grid = {hash_integers(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(grid) == 8000 and hash_integers(1, 2) != hash_integers(2, 1)
    drawn = np.array([as_uniform(hash_integers(9, i)) for i in range(4000)])
    assert 0 <= drawn.min() and drawn.max() < 1
    counts = np.histogram(drawn, 10, (0, 1))[0]
    assert abs(counts - 400).max() < 80  # 4 standard deviations


def test_prompt_begins_like_a_story(tmp_path):
    """The tokenizer prepends <|endoftext|>, also when read from a model's folder."""
    write_tokenizer(TOKENIZER, tmp_path)
    for tokenizer in (TOKENIZER, read_tokenizer(tmp_path)):
        ids = tokenizer.encode("One day")
        assert ids == [tokenizer.eos, *tokenizer.encode("One day", special=False)]
        assert tokenizer.decode(ids) == "One day" and tokenizer.encode("") == [tokenizer.eos]
        assert end_id(tokenizer) == tokenizer.bos == tokenizer.eos == len(tokenizer) - 1


def test_story_ids_are_pinned():
    """Pinned: trained models depend on these ids."""
    ids = rows(grades={"full": 1}, row_length=250).batch(3, 0, 4).ids
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16] == "2c7f49f6b66a44c2"


def test_tokenizer_without_endoftext_is_refused():
    class Letters:
        def encode(self, text, special=True):
            return [ord(c) for c in text]

    with pytest.raises(MinitxError, match="endoftext"):
        end_id(Letters())


def test_kinds_are_numbered_from_one():
    assert [KIND_NUMBER[kind] for kind in KINDS] == list(range(1, len(KINDS) + 1))
