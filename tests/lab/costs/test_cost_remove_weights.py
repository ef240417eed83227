"""``minitx cost remove-weights``: every cell of the example table of arXiv 2404.12362."""

import json
from dataclasses import replace

import pytest

from minitx.lab.cost import cost
from minitx.lab.costs.remove_weights import RemoveWeightsCost

SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
FILES = {
    "pythia": SIZES
    | {"model_type": "gpt_neox", "intermediate_size": 16384, "vocab_size": 50400}
    | {"use_parallel_residual": True, "tie_word_embeddings": False},
    "mistral": SIZES
    | {"model_type": "mistral", "intermediate_size": 14336, "vocab_size": 32000}
    | {"num_key_value_heads": 8, "tie_word_embeddings": False},
}
PUBLISHED = {  # Pythia-6.9B, Mistral-7B
    "qp_weights": (33_554_432, 33_554_432),
    "kv_weights": (33_554_432, 8_388_608),
    "ffn_weights": (134_217_728, 176_160_768),
    "embedding_weights": (None, 262_144_000),
    "total_weights": ("6.9B", "7.2B"),
    "left": ("5.8B", None),
    "saving": (None, "15%"),
    "speedup": (None, None),
}
BY_HAND = {  # the cells that are None above: 2 * 4096 * 50400 and so on
    "embedding_weights": (412_876_800, 262_144_000),
    "total_weights": (6_855_327_744, 7_241_465_856),
    "left": (6_855_327_744 - 1_073_741_824, 7_241_465_856 - 1_073_741_824),
    "saving": ("16%", "15%"),
    "speedup": ("1.19x", "1.17x"),
}


def costs(folder, name) -> RemoveWeightsCost:
    path = folder / "config.json"
    path.write_text(json.dumps(FILES[name]))
    return cost("remove_weights", path)


def as_printed(row, value):
    if row == "saving":
        return f"{value:.0%}"
    return f"{value:.2f}x" if row == "speedup" else f"{value / 1e9:.1f}B"


@pytest.mark.parametrize("column, name", list(enumerate(FILES)))
@pytest.mark.parametrize("row", PUBLISHED)
def test_remove_weights_cost_published_cells(tmp_path, row, column, name):
    found = getattr(costs(tmp_path, name), row)
    for cell in (PUBLISHED[row][column], BY_HAND.get(row, PUBLISHED[row])[column]):
        assert cell is None or cell == (as_printed(row, found) if isinstance(cell, str) else found)


def test_remove_weights_cost_of_serial_and_parallel_blocks(tmp_path):
    pythia, mistral = (costs(tmp_path, name) for name in FILES)
    assert pythia.removed == mistral.removed == 2 * 32 * 4096**2
    assert mistral.removed_exactly == mistral.removed
    assert pythia.removed_exactly == pythia.removed // 2  # its blocks are parallel
    assert any("only one of them can go" in note for note in pythia.notes())
    other = RemoveWeightsCost(replace(mistral.shape, head_width=100, experts=4, tied=True))
    words = " ".join(other.notes())
    assert all(w in words for w in ("not square", "every expert", "a table of its own"))


def test_remove_weights_cost_text_and_json(tmp_path):
    c = costs(tmp_path, "mistral")
    for cell in ("7,241,465,856", "6,167,724,032", "15%", "1.17x"):
        assert cell in str(c), cell
    assert json.loads(json.dumps(c.as_dict()))["left"] == 6_167_724_032
