"""A second model: its vocabulary must be the same; the first blocks of a model as a smaller one."""

from dataclasses import replace

import numpy as np
import pytest
from same import assert_same
from tiny import END, FAMILIES, TOKENIZER, tiny_folder, tiny_lm, tiny_model

from minitx.errors import MinitxError
from minitx.lm import LM
from minitx.second_model import first_blocks, load_second, why_another_vocabulary
from minitx.technique import NoSuchPart
from minitx.tree import Part, part

# Which model -------------------------------------------------------------------------------------


class Other(type(TOKENIZER)):
    """The same tokens except one."""

    def token_bytes(self, id, previous=None):
        return b"?" if id == 200 else super().token_bytes(id, previous)


PIECES = TOKENIZER.tokens, TOKENIZER.merges, TOKENIZER.added
OTHER = Other(*PIECES, bos=END, eos=END, adds_bos=True)
SAME = type(TOKENIZER)(*PIECES, bos=END, eos=END)  # without a first token: still the same tokens


def test_vocabularies_are_compared_by_token_or_by_size_without_a_tokenizer():
    lm = tiny_lm()
    assert why_another_vocabulary(lm, lm) == ""
    assert why_another_vocabulary(lm, tiny_lm("gpt2", tokenizer=SAME)) == "", "equal tokens"
    assert "tokens differ" in why_another_vocabulary(lm, tiny_lm(tokenizer=OTHER))
    assert "tokens differ" in why_another_vocabulary(tiny_lm(tokenizer=OTHER), lm)
    for bare in (tiny_lm(tokenizer=None), lm):
        assert why_another_vocabulary(bare, tiny_lm(tokenizer=None)) == "", "only ids to compare"
    small = LM(tiny_model(vocab_size=9, bos=None, eos=()))
    assert why_another_vocabulary(lm, small) == "it has 9 tokens and this model 259"


def test_second_model_is_loaded_by_path(tmp_path):
    folder = tiny_folder(tmp_path / "toy", "gpt2")
    for lm in (tiny_lm(), tiny_lm(tokenizer=None)):
        other = load_second(lm, folder, "a test", "draft")
        assert_same(other.logits([1, 2]), tiny_lm("gpt2").logits([1, 2]))


@pytest.mark.parametrize(
    "name, tokenizer, words",
    [
        ("./nowhere", TOKENIZER, "cascade cannot load its small model: There is no model"),
        (
            "stories-draft",
            TOKENIZER,
            "cascade cannot use 'stories-draft' as its small model: it has 1022 tokens and this "
            "model 259; give a model that shares the tokenizer.",
        ),
        ("toy", OTHER, "its tokens differ from this model's; give a model that shares"),
    ],
)
def test_second_model_with_another_vocabulary_is_refused(name, tokenizer, words, tmp_path):
    name = tiny_folder(tmp_path / "toy") if name == "toy" else name
    with pytest.raises(MinitxError) as caught:
        load_second(tiny_lm(tokenizer=tokenizer), name, "cascade", "small model")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_refusal_says_what_to_give_instead(tmp_path):
    with pytest.raises(MinitxError, match="shares the tokenizer, or small=self.$"):
        load_second(tiny_lm(), "stories-draft", "cascade", "small model", "small=self")


# First blocks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_first_blocks_equal_running_those_blocks(family):
    model, ids = tiny_model(family, dtype=np.float64, layers=3), np.arange(9)
    small = first_blocks(model, 2, "a test")
    assert small.config == replace(model.config, layers=2)
    assert small.stack.blocks == model.stack.blocks[:2], "the blocks are shared, not copied"
    x = model.embed(ids, slice(0, 9))
    state = model.new_state()
    state.take(9)
    x = model.stack.run(x, state, 0, 2)  # by hand: two of the three blocks, then norm and head
    assert_same(small(ids), model.head(model.norm(x)))
    assert len(small.new_state().layers) == 2


@pytest.mark.parametrize("n", [0, -1, 3])
def test_first_blocks_refuses_a_number_out_of_range(n):
    with pytest.raises(MinitxError, match=f"^cascade .* the first {n} blocks .*; give 1 to 2"):
        first_blocks(tiny_model(), n, "cascade")
    assert len(first_blocks(tiny_model(), 2, "cascade").stack.blocks) == 2


@part
class OtherStack(Part):
    blocks: tuple


def test_first_blocks_refuses_a_stack_that_is_not_plain():
    model = tiny_model()
    with pytest.raises(NoSuchPart):
        first_blocks(replace(model, stack=OtherStack(model.stack.blocks)), 1, "cascade")
