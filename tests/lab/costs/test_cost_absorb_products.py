"""``minitx cost absorb-products``: when it pays, and that the ledger counts the same."""

import json

import numpy as np
import pytest
from tiny import tiny_lm

from minitx.cli import main
from minitx.errors import MinitxError
from minitx.lab.cost import cost
from minitx.ledger import counting
from minitx.technique import apply


def gpt2(width, heads, head_dim=None, **more):
    fields = dict(model_type="gpt2", n_embd=width, n_layer=2, n_head=heads, n_positions=48)
    fields |= {"vocab_size": 259, "n_inner": 24} | more
    return fields | ({"head_dim": head_dim} if head_dim else {})


@pytest.fixture
def costs(tmp_path):
    def of(fields, *words):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(fields))
        return cost("absorb_products", path, words)

    return of


@pytest.mark.parametrize("pairs, way", [("qk", 1), ("ov", 2), ("both", 3)])
def test_absorb_products_cost_is_what_the_ledger_counts(costs, pairs, way):
    S = 30
    lm = apply(tiny_lm("gpt2"), {"absorb_products": {"pairs": pairs}})
    state = lm.model.new_state()
    ids = np.arange(S)
    lm.model(ids[:-1], state)
    with counting(lm) as counts:
        lm.model(ids[-1:], state)
    found = counts.total("model.stack.blocks.0.attn")
    expected = costs(gpt2(16, 2), f"tokens={S}").ways()[way]
    assert found.multiply_adds == expected.multiply_adds
    assert found.weight_bytes == 4 * expected.weights
    assert state.bytes_per_token == 4 * expected.cache * 2  # layers


@pytest.mark.parametrize("head_dim, smaller", [(8, False), (9, True), (16, True)])
def test_absorb_products_cost_one_matrix_is_smaller_if_d_is_above_half_of_the_width(
    costs, head_dim, smaller
):
    c = costs(gpt2(16, 1, head_dim))
    assert c.smaller is smaller
    assert (c.ways()[3].weights < c.ways()[0].weights) is smaller


def test_absorb_products_cost_pays_for_one_head_and_loses_by_d_over_the_width_for_more(costs):
    one = costs(gpt2(768, 1))
    assert one.pays and one.ways()[3].multiply_adds < one.ways()[0].multiply_adds
    twelve = costs(gpt2(768, 12), "tokens=100000")
    assert not twelve.pays
    loss = twelve.ways()[3].multiply_adds / twelve.ways()[0].multiply_adds
    assert 11.5 < loss <= 12  # D / d, where scores and weighted sums outweigh all else
    assert twelve.ways()[3].cache * 2 == twelve.ways()[0].cache


def test_absorb_products_cost_pays_for_a_latent_and_many_tokens(costs):
    """A latent of 512 for 128 heads of 128: keys and values would be made from it at every step."""
    fields = gpt2(5120, 128, 128)
    many, none = costs(fields, "latent=512", "tokens=4096"), costs(fields, "tokens=4096")
    separate, two, one = many.ways()
    assert many.pays and two.multiply_adds * 50 < separate.multiply_adds
    assert two.weights == separate.weights < one.weights
    assert separate.cache == 512 and none.ways()[0].cache == 2 * 128 * 128
    # By hand: queries and outputs, to the latent and back, scores and weighted sums.
    assert two.multiply_adds == 2 * (5120 * 16384 + 16384 * 512 + 4096 * 128 * 512)


def test_absorb_products_cost_command(costs, tmp_path, capsys):
    costs(gpt2(768, 12))
    path = str(tmp_path / "config.json")
    assert main(["cost", "absorb-products", "latent=64", "--config", path]) == 0
    assert "absorbed, in two products" in capsys.readouterr().out
    assert main(["cost", "absorb-products", "--config", path]) == 0
    assert "Absorbing costs multiply-adds here." in capsys.readouterr().out
    assert json.loads(json.dumps(costs(gpt2(768, 12)).as_dict()))["pays"] is False


def test_absorb_products_cost_refusals(costs):
    for words, message in (
        (("tokens=-1",), "tokens must be an integer, at least 0; got -1"),
        (("latent=-1",), "latent must be an integer, at least 0; got -1"),
    ):
        with pytest.raises(MinitxError, match=message):
            costs(gpt2(16, 2), *words)
