"""dota: what it counts, refuses and prints, and the file that its detectors are read from."""

import json
from dataclasses import replace

import numpy as np
import pytest
from test_dota import IDS
from tiny import FAMILIES, tiny_folder, tiny_lm, tiny_model

import minitx
from minitx.checkpoints.huggingface import write_model
from minitx.checkpoints.safetensors import read_tensors
from minitx.checkpoints.safetensors_write import write_safetensors
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.skip.dota.detector import random_detectors, read_detectors, write_detectors
from minitx.technique import apply, find

LLAMA = FAMILIES["llama"]


# Counts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [4, None])
def test_a_decoded_token_costs_what_the_card_says(family, bits):
    S, kappa, rank = 30, 7, 4
    lm = apply(tiny_lm(family), {"dota": {"kappa": kappa, "bits": bits, "k": rank}})
    c, state = lm.model.config, lm.model.new_state()
    H, K, d, D = c.heads, c.kv_heads, c.head_width, c.width
    lm.model(IDS[: S - 1], state)
    with counting(lm) as counts:
        lm.model(IDS[S - 1 : S], state)
    path = "model.stack.blocks.0.attn"
    detect = counts.entries[path + ".detect"]
    choose = counts.entries[path + ".attn.attend.selector"]
    exact = counts.entries[path + ".attn.attend"]
    assert detect.multiply_adds == D * rank + rank**2 * (H + K)
    assert detect.weight_bytes == 4 * detect.multiply_adds
    assert choose.multiply_adds == H * S * rank
    assert choose.cache_bytes == K * S * (4 + rank * (1 if bits else 4))
    assert exact.multiply_adds == 2 * H * kappa * d
    assert exact.cache_bytes == 8 * H * kappa * d
    assert counts.events == {
        "keys seen": c.layers * H * S,
        "keys kept": c.layers * H * kappa,
        "key loads, row by row": c.layers * H * kappa,
        "key loads, 4 rows together": c.layers * H * kappa,
    }


def test_a_prompt_saves_nothing_and_every_row_keeps_as_many():
    T, kappa = 30, 7
    lm = apply(tiny_lm(), {"dota": {"kappa": kappa, "rows": 8}})
    c = lm.model.config
    with counting(lm) as counts:
        lm.model(IDS[:T], lm.model.new_state())
    path = "model.stack.blocks.0.attn.attn.attend"
    assert counts.entries[path].multiply_adds == 2 * c.heads * T * T * c.head_width
    assert counts.entries[path + ".selector"].multiply_adds == c.heads * T * T * 2
    kept = c.layers * c.heads * sum(min(kappa, i + 1) for i in range(T))
    assert counts.events["keys kept"] == counts.events["key loads, row by row"] == kept
    assert 0 < counts.events["key loads, 8 rows together"] < kept


# The file ----------------------------------------------------------------------------------------


def folder_with_detectors(folder, k=4, seed=0, family="llama", tokenizer=True):
    tiny_folder(folder, family, tokenizer)
    write_detectors(random_detectors(FAMILIES[family], k, seed), folder)
    return folder


def test_detectors_come_back(tmp_path):
    written = random_detectors(LLAMA, 4, 0)
    write_detectors(written, tmp_path)
    for dtype in (np.float32, np.float64):
        for ours, theirs in zip(read_detectors(tmp_path, LLAMA, dtype), written, strict=True):
            for name in ("p", "w_q", "w_k"):
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
                assert getattr(ours, name).dtype == dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_detectors_uses_them(tmp_path, family):
    folder = folder_with_detectors(tmp_path, family=family, tokenizer=False)
    lm = minitx.load(folder, dota={"kappa": 6})
    assert lm.folder == folder and "fit=trained" in repr(lm) and "p 16x4" in repr(lm)
    state = lm.model.new_state()
    single = [lm.model(IDS[t : t + 1], state)[0] for t in range(40)]
    np.testing.assert_allclose(single, lm.logits(IDS), atol=1e-4)
    assert (lm.logits(IDS) != minitx.load(folder).logits(IDS)).any()
    assert "fit=trained" in repr(minitx.load(folder, dota={"fit": "trained", "k": 4}))
    double = minitx.load(folder, dtype=np.float64, dota=True)
    assert double.logits(IDS).dtype == np.float64


def test_a_fit_may_be_wanted_all_the_same(tmp_path):
    lm = minitx.load(folder_with_detectors(tmp_path), dota={"fit": "post-hoc"})
    assert "fit=post-hoc" in repr(lm) and "p 16x2" in repr(lm)
    without = tmp_path / "without"
    without.mkdir()
    assert "fit=post-hoc" in repr(minitx.load(tiny_folder(without), dota=True))


def changed(folder, change):
    """The file with its tensors (a dict) changed."""
    tensors = read_tensors(folder / "dota.safetensors")
    change(tensors)
    write_safetensors(folder / "dota.safetensors", tensors)


FAULTS = {
    "has no tensor 'blocks.1.w_k'": lambda t: t.pop("blocks.1.w_k"),
    "holds 'blocks.2.p'": lambda t: t.update({"blocks.2.p": t["blocks.0.p"]}),
    "w_q has the shape (4, 4)": lambda t: t.update({"blocks.0.w_q": t["blocks.0.w_k"]}),
    "blocks.1.p has the shape (16, 2)": lambda t: t.update({"blocks.1.p": t["blocks.1.p"][:, :2]}),
    "has k=3; an even number": lambda t: t.update({"blocks.0.p": t["blocks.0.p"][:, :3]}),
    "has k=0;": lambda t: t.update({"blocks.0.p": np.float32(1)}),
    "NaN or Inf": lambda t: t["blocks.1.w_q"].__setitem__((0, 0), np.nan),
}


@pytest.mark.parametrize("words", FAULTS)
def test_a_file_that_does_not_fit(tmp_path, words):
    changed(folder_with_detectors(tmp_path), FAULTS[words])
    with pytest.raises(MinitxError) as refused:
        minitx.load(tmp_path, dota=True)
    text = str(refused.value)
    assert words in text and "dota.safetensors" in text and "\n" not in text


def test_detectors_of_other_weights_are_refused(tmp_path):
    folder = folder_with_detectors(tmp_path)
    minitx.load(folder, dota=True)
    write_model(tiny_model(seed=2), folder, "F32")
    with pytest.raises(MinitxError, match="dota.safetensors: was not trained with the weights"):
        minitx.load(folder, dota=True)
    minitx.load(folder, dota={"fit": "post-hoc"})


@pytest.mark.parametrize("keep", [0, 7, 100, 1000])
def test_a_damaged_file(tmp_path, keep):
    path = folder_with_detectors(tmp_path) / "dota.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MinitxError, match="dota.safetensors: "):
        minitx.load(tmp_path, dota=True)


def test_another_model_is_not_disturbed_by_the_file(tmp_path):
    folder = folder_with_detectors(tmp_path)
    with_file = minitx.load(folder).logits(IDS)
    (folder / "dota.safetensors").write_bytes(b"damaged")
    np.testing.assert_array_equal(minitx.load(folder).logits(IDS), with_file)


# Refusals, and what is printed -------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"kappa": 0}, "kappa=0; a whole number of at least 1"),
        ({"bits": 1}, "bits=1; a whole number from 2 to 8 is needed, or None"),
        ({"bits": 9}, "bits=9"),
        ({"rows": 0}, "rows=0; a whole number from 1 to 8"),
        ({"rows": 9}, "rows=9"),
        ({"k": 3}, "k=3; an even number from 2 to the head width, 8"),
        ({"k": 10}, "k=10"),
        ({"k": 0}, "k=0"),
        ({"fit": "trained"}, "fit=trained but the model has no dota.safetensors"),
    ],
)
def test_settings_that_are_refused(options, words):
    with pytest.raises(MinitxError) as refused:
        apply(tiny_lm(), {"dota": options})
    text = str(refused.value)
    assert text.startswith("dota has ") and words in text and "\n" not in text


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(MinitxError, match="^dota learns from .* train it with a detector.$"):
        apply(replace(tiny_lm(), tokenizer=None), {"dota": True})
    folder = tiny_folder(tmp_path)
    with pytest.raises(MinitxError, match="^dota has fit=trained .*" + str(folder) + " has none"):
        minitx.load(folder, dota={"fit": "trained"})


def test_refusals_that_go_with_a_trained_detector(tmp_path):
    folder = folder_with_detectors(tmp_path)
    with pytest.raises(MinitxError, match="^dota has k=2 but the trained detector has k=4"):
        minitx.load(folder, dota={"k": 2})
    with pytest.raises(MinitxError, match="dota needs a part of type .* where fold_norms has put"):
        minitx.load(folder, dota=True, fold_norms=True)
    minitx.load(folder, dota=True, fuse_projections=True).logits(IDS)


@pytest.mark.parametrize("other", ["first_layer", "predictive_attention"])
def test_techniques_that_want_the_same_part(other):
    with pytest.raises(MinitxError) as refused:
        apply(tiny_lm(), {"dota": True, other: True})
    assert "dota" in str(refused.value) and other in str(refused.value)


def test_the_card_says_what_is_not_the_papers():
    sections = find("dota").card.sections
    assert "Unconfirmed" in sections["Paper"] and "substitute" in sections["Kind"]
    assert "152" not in json.dumps(sections)  # no figure of the paper's, nor of ours
