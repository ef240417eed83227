"""``minitx cost kv-share``: bytes and multiply-adds of a running model, and of a published model by
hand."""

import json

import numpy as np
import pytest
from tiny import FAMILIES, TOKENIZER, tiny_model

from minitx.checkpoints.hf_config_write import config_fields
from minitx.errors import MinitxError
from minitx.lab.cost import cost
from minitx.ledger import counting
from minitx.lm import LM
from minitx.technique import apply

LLAMA_2 = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 32000}
LLAMA_2 |= {"num_attention_heads": 32, "intermediate_size": 11008, "max_position_embeddings": 4096}


def costs(folder, fields, *words):
    path = folder / "config.json"
    path.write_text(json.dumps(fields))
    return cost("kv-share", path, words)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size, group", [(None, 2), (3, 2), (5, 9)])
def test_predicted_cost_equals_that_of_a_running_model(family, size, group, tmp_path):
    lm = LM(tiny_model(family, layers=5), TOKENIZER)
    found = costs(tmp_path, config_fields(lm.model.config), f"size={size}", f"group={group}")
    sharing = apply(lm, {"kv_share": dict(first=0, size=size, group=group)})
    work = []
    for expected, made in ((found.dense, lm), (found.shared, sharing)):
        state = made.model.new_state()
        with counting(made) as counts:
            made.model(np.arange(5), state)
        assert state.bytes_per_token == 2 * expected  # float32 here
        work.append(counts.total().multiply_adds)
    assert work[0] - work[1] == 5 * found.weights


def test_bytes_of_a_published_model_by_hand(tmp_path):
    found = costs(tmp_path, LLAMA_2)
    assert found.dense == 32 * 2 * 4096 * 2 and found.shared == found.dense // 2  # half a MiB
    assert found.followers == 16 and found.weights == 16 * 2 * 4096 * 4096
    assert " 1,073.7 MB" in str(found) and " 0.50x" in str(found)
    third = costs(tmp_path, LLAMA_2, "group=3", "tokens=100")  # 11 groups; the last has 2 layers
    assert third.followers == 21 and third.as_dict()["share"] == pytest.approx(11 / 32)
    some = costs(tmp_path, LLAMA_2, "size=4", "group=4")
    assert some.followers == 3 and "4 of 32 layers in groups of 4" in str(some)


def test_bad_options_are_refused(tmp_path):
    for word, message in (
        ("group=0", "cost kv-share: group must be an integer, at least 1; got 0"),
        ("tokens=0", "tokens must be an integer, at least 1, or None; got 0"),
    ):
        with pytest.raises(MinitxError, match=message):
            costs(tmp_path, LLAMA_2, word)
