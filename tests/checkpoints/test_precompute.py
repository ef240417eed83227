"""``minitx precompute``: a written model reads back unchanged; corrupt files are rejected and run
no code."""

import json
import os
import random
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from test_contract import ALL, IDS, each, family
from tiny import FAMILIES, TOKENIZER, tiny_folder, tiny_lm

import minitx
from minitx.build import random_model
from minitx.checkpoints import precomputed
from minitx.checkpoints.common import fingerprint
from minitx.checkpoints.parts import deserialize, serialize
from minitx.checkpoints.precomputed import (
    ARRAYS_FILE,
    JSON_FILE,
    Origin,
    read_precomputed,
    signature,
    write_precomputed,
)
from minitx.checkpoints.safetensors import read_as_stored
from minitx.checkpoints.safetensors_write import write_safetensors
from minitx.errors import MinitxError, MinitxWarning
from minitx.ledger import counting
from minitx.model import Activated
from minitx.shared.small_answers import finite
from minitx.technique import apply, swap
from minitx.tree import nbytes, walk

ORIGIN = Origin("toy", "--fold-norms")


def written(lm, folder, tokenizer=None):
    write_precomputed(lm, folder, ORIGIN, tokenizer)
    return folder


def changed(name, lm_family, dtype=np.float32):
    """With default options, calibrated on few stories; "self" is the second model of those that
    have one."""
    own = {o: "self" for o in ALL[name].options if o in ("draft", "small", "member")}
    own |= {o: 4 for o in ALL[name].options if o == "stories"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MinitxWarning)  # cascade: it does not pay
            return apply(tiny_lm(lm_family, dtype), {name: own})
    except MinitxError as error:
        pytest.skip(str(error))


@each
@family
def test_technique_round_trips(name, family, tmp_path):
    lm = changed(name, family)
    model, decode = read_precomputed(written(lm, tmp_path / "out"))
    assert repr(model) == repr(lm.model) and repr(decode) == repr(lm.decode)
    again = tiny_lm(model=model, decode=decode)
    np.testing.assert_array_equal(again.logits(IDS), lm.logits(IDS))
    assert again.generate(IDS[:5], 10) == lm.generate(IDS[:5], 10)
    assert nbytes(again) == nbytes(lm)  # shared arrays stay shared


@pytest.mark.parametrize("name", ["cascade", "router"])
def test_threshold_that_keeps_everything_can_be_saved(name, tmp_path):
    """The cut is not Inf, which JSON does not have; that of one that keeps nothing neither."""
    lm = apply(tiny_lm(), {name: {"small": "self", "threshold": 0, "choose": "random"}})
    _, decode = read_precomputed(written(lm, tmp_path / "out"))
    assert repr(decode) == repr(lm.decode)
    assert -1e100 < decode.cut <= 0 and finite(np.inf) < 1e100


def test_value_that_cannot_be_saved_names_the_technique(tmp_path):
    lm = apply(tiny_lm(), {"answer_cache": {"file": "memory"}})
    lm = replace(lm, decode=replace(lm.decode, name=b"x"))
    with pytest.raises(MinitxError, match="holds a bytes, .* leave out answer_cache, and apply it"):
        written(lm, tmp_path / "out")


def test_all_techniques_are_covered():
    assert len(ALL) > 10


def test_float64_model_loads_only_in_float64(tmp_path):
    lm = changed("fold_norms", "llama", np.float64)
    model, _ = read_precomputed(written(lm, tmp_path / "out"), np.float64)
    np.testing.assert_array_equal(model(IDS), lm.logits(IDS))
    with pytest.raises(MinitxError, match="precomputed in 'float64'; load it in that dtype"):
        read_precomputed(tmp_path / "out")


def test_shared_parts_and_arrays_stay_shared(tmp_path):
    lm = tiny_lm("gpt2")
    model, _ = read_precomputed(written(lm, tmp_path / "out"))
    assert model.head.w is model.embed.tokens.w
    lm = tiny_lm(model=random_model(FAMILIES["llama"]))
    blocks = read_precomputed(written(lm, tmp_path / "rope"))[0].stack.blocks
    assert blocks[0].attn.rope is blocks[1].attn.rope


def test_integer_arrays_keep_their_dtypes(tmp_path):
    lm = changed("elsa", "llama")
    kinds = {w.dtype for _, node in walk(lm) for w in vars(node).values() if hasattr(w, "dtype")}
    model, _ = read_precomputed(written(lm, tmp_path / "out"))
    found = {w.dtype for _, node in walk(model) for w in vars(node).values() if hasattr(w, "dtype")}
    assert found == kinds


def test_loading_reads_no_calibration_text(tmp_path, monkeypatch):
    lm = apply(tiny_lm(), {"early_exit": {"measure": "probe"}})
    written(lm, tmp_path / "out")

    def fail(*_):
        raise AssertionError("calibration text was read")

    monkeypatch.setattr("minitx.calibration.Stories.ids", fail)
    model, _ = read_precomputed(tmp_path / "out")
    np.testing.assert_array_equal(model(IDS), lm.logits(IDS))


# Files -------------------------------------------------------------------------------------------


def test_existing_folder_is_rejected(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(MinitxError, match="already exists"):
        written(tiny_lm(), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_leaves_no_folder(tmp_path, monkeypatch, fault):
    def fail(*_):
        raise fault

    monkeypatch.setattr(precomputed, "write_safetensors", fail)
    with pytest.raises((MinitxError, KeyboardInterrupt)):
        written(tiny_lm(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_unserializable_value_is_rejected(tmp_path):
    lm = tiny_lm("gpt2")

    def local(x):
        return x

    for bad, message in ((local, "top level of one of minitx's modules"), ({}, "holds a dict")):
        odd = swap(lm, Activated, lambda part, bad=bad: replace(part, activation=bad))
        with pytest.raises(MinitxError, match=message):
            written(odd, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def edited(folder, change, sign=True):
    """Change the JSON, and its fingerprint with it: so that the checks behind that are reached."""
    found = json.loads((folder / JSON_FILE).read_text())
    change(found)
    if sign:
        found["fingerprint"] = signature(found)
    (folder / JSON_FILE).write_text(json.dumps(found))


def first(found, part):
    return next(e for e in found["entries"] if e["part"].endswith(":" + part))


EDITS = {
    "version": lambda f: f.update(format=1),
    "dtype": lambda f: f.update(dtype=4),
    "root": lambda f: f.update(model=10**6),
    "root is not a model": lambda f: f.update(model=0),
    "no entries": lambda f: f.update(entries=[]),
    "entries missing": lambda f: f.pop("entries"),
    "entry": lambda f: f["entries"].insert(0, 3),
    "module": lambda f: first(f, "Linear").update(part="os:system"),
    "module of minitx": lambda f: first(f, "Linear").update(part="minitx.cli:main"),
    "no such module": lambda f: first(f, "Linear").update(part="minitx.skip.nothing:Linear"),
    "imported name": lambda f: first(f, "Linear").update(part="minitx.skip.a3:np"),
    "not a part": lambda f: first(f, "Linear").update(part="minitx.ops:silu"),
    "other part": lambda f: first(f, "Linear").update(part="minitx.model:Rope"),
    "field missing": lambda f: first(f, "Linear")["fields"].pop("b"),
    "unknown field": lambda f: first(f, "Linear")["fields"].update(c=1),
    "array": lambda f: first(f, "Linear")["fields"].update(w={"array": "nowhere"}),
    "other array": lambda f: first(f, "Linear")["fields"].update(w={"array": "model.embed.w"}),
    "number for an array": lambda f: first(f, "Linear")["fields"].update(w=3),
    "list": lambda f: first(f, "Linear")["fields"].update(w=[3]),
    "two keys": lambda f: first(f, "Linear")["fields"].update(w={"array": "x", "entry": 1}),
    "later entry": lambda f: first(f, "Attention")["fields"].update(norm={"entry": 10**4}),
    "function": lambda f: first(f, "Attention")["fields"].update(norm={"function": "minitx.ops:x"}),
    "string for a number": lambda f: first(f, "Attention")["fields"].update(heads="2"),
    "heads": lambda f: first(f, "Attention")["fields"].update(heads=3),
    "eps": lambda f: first(f, "RMSNorm")["fields"].update(eps=None),
    "config": lambda f: first(f, "Transformer")["fields"]["config"]["config"].update(more=1),
    "sizes": lambda f: first(f, "Transformer")["fields"]["config"]["config"].update(layers=-1),
    "layers": lambda f: first(f, "Transformer")["fields"]["config"]["config"].update(layers=1),
    "vocabulary": lambda f: first(f, "Transformer")["fields"]["config"]["config"].update(
        vocab_size=7
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return written(tiny_lm(), tmp_path_factory.mktemp("whole") / "out")


@pytest.mark.parametrize("name", EDITS)
def test_corrupt_json_is_rejected(name, folder, tmp_path):
    (tmp_path / ARRAYS_FILE).write_bytes((folder / ARRAYS_FILE).read_bytes())
    (tmp_path / JSON_FILE).write_text((folder / JSON_FILE).read_text())
    read_precomputed(tmp_path)
    edited(tmp_path, EDITS[name])
    with pytest.raises(MinitxError) as caught:
        read_precomputed(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def leaves(value, path=()):
    """The path of every value in nested objects and lists."""
    if path:
        yield path
    inner = (
        value if isinstance(value, dict) else dict(enumerate(value if type(value) is list else ()))
    )
    for key, item in inner.items():
        yield from leaves(item, (*path, key))


def changed_at(content, path, value):
    """A copy with another value at this path."""
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[path[0]] = changed_at(content[path[0]], path[1:], value)
    return copy


VALUES = (None, True, 0, -1, 2**70, 0.5, 1e308, "", "x", [], [1], {}, {"array": "x"}, {"entry": 0})


def test_any_other_value_in_the_json_is_refused(folder, tmp_path):
    """Even one that would run: a doubled attention scale must not load."""
    (tmp_path / ARRAYS_FILE).write_bytes((folder / ARRAYS_FILE).read_bytes())
    content = json.loads((folder / JSON_FILE).read_text())
    scale = first(content, "Attend")["fields"]["scale"]
    edited_scale = json.dumps(content).replace(str(scale), str(2 * scale))
    paths = list(leaves(content))
    texts = [json.dumps(changed_at(content, path, VALUES[i % 14])) for i, path in enumerate(paths)]
    texts += [json.dumps(changed_at(content, ("fingerprint",), value)) for value in VALUES]
    for text in (edited_scale, *texts):
        (tmp_path / JSON_FILE).write_text(text)
        if json.loads(text) != content:
            with pytest.raises(MinitxError) as caught:
                read_precomputed(tmp_path)
            assert str(tmp_path) in str(caught.value) and len(str(caught.value)) <= 400
    (tmp_path / JSON_FILE).write_text(json.dumps(content, separators=(",", ":"), sort_keys=True))
    read_precomputed(tmp_path)  # spaces and the order of keys do not matter


SIGNED = [
    "a3",
    "quantize",
    "lut_product",
    "early_exit",
    "first_layer",
    "sparse_memory",
    "pack_zeros",
]


@pytest.mark.parametrize("name", SIGNED)
def test_signed_changes_are_refused_at_load_or_run(name, tmp_path):
    """Both fingerprints mended, as only somebody does who wants to deceive: what loads, runs."""
    lm = next(lm for lm in map(tiny_lm, FAMILIES) if fits(lm, name))
    lm = apply(lm, {name: ALL[name].demo})
    out = written(lm, tmp_path / "out")
    content, arrays = json.loads((out / JSON_FILE).read_text()), read_as_stored(out / ARRAYS_FILE)
    draw, paths, refused = random.Random(name), list(leaves(content)), 0
    for case in range(40):
        edit, changes = content, dict(arrays)
        if case % 2:
            edit = changed_at(content, draw.choice(paths), draw.choice(VALUES))
        else:
            at = draw.choice(list(arrays))
            w = arrays[at]
            changes[at] = draw.choice([w.reshape(-1), w[None], w[:1], w[..., :-1], w.T.copy()])
        write_safetensors(out / ARRAYS_FILE, changes, None, {"format": "x"})
        edit = edit | {"arrays": fingerprint(out / ARRAYS_FILE)}
        (out / JSON_FILE).write_text(json.dumps(edit | {"fingerprint": signature(edit)}))
        try:
            model, decode = read_precomputed(out)
        except MinitxError as error:
            assert str(out) in str(error)
            refused += 1
        else:
            tiny_lm(model=model, decode=decode).generate(IDS[:8], 12)
    assert refused > 20


def fits(lm, name) -> bool:
    try:
        return apply(lm, {name: ALL[name].demo}) is not lm
    except MinitxError:
        return False


def test_smoke_test_leaves_nothing_in_the_stores(tmp_path):
    lm = apply(tiny_lm(), {"prefix_cache": {"block": 2}})
    model, decode = read_precomputed(written(lm, tmp_path / "out"))
    again = tiny_lm(model=model, decode=decode)
    with counting(again) as counts:
        again.generate(list(np.linspace(0, 258, 24).astype(int)), 2)
    with counting(lm) as expected:
        lm.generate(list(np.linspace(0, 258, 24).astype(int)), 2)
    assert counts.events == expected.events, "tokens of the smoke test were still stored"


def test_arrays_with_a_mended_fingerprint_are_refused(folder, tmp_path):
    """The fingerprint of the arrays is itself under that of the JSON."""
    arrays = read_as_stored(folder / ARRAYS_FILE)
    name = next(name for name, w in arrays.items() if w.ndim == 2)
    write_safetensors(
        tmp_path / ARRAYS_FILE, arrays | {name: arrays[name].T.copy()}, None, {"format": "x"}
    )
    (tmp_path / JSON_FILE).write_text((folder / JSON_FILE).read_text())
    mended = fingerprint(tmp_path / ARRAYS_FILE)
    edited(tmp_path, lambda f: f.update(arrays=mended), sign=False)
    with pytest.raises(MinitxError, match="does not match its own fingerprint"):
        read_precomputed(tmp_path)
    edited(tmp_path, lambda f: f.update(arrays=mended))
    with pytest.raises(MinitxError, match="its parts do not fit together|finite logits"):
        read_precomputed(tmp_path)


def test_folder_of_a_killed_run_is_removed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left = tmp_path / f".out.{process.pid}.tmp"
    left.mkdir()
    (left / ARRAYS_FILE).write_bytes(b"half")
    written(tiny_lm(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_corrupt_or_missing_arrays_are_rejected(folder, tmp_path):
    (tmp_path / JSON_FILE).write_text((folder / JSON_FILE).read_text())
    with pytest.raises(MinitxError, match="no such file"):
        read_precomputed(tmp_path)
    data = bytearray((folder / ARRAYS_FILE).read_bytes())
    for corrupted in (data[:-4], data[:-1] + bytes([data[-1] ^ 1])):
        (tmp_path / ARRAYS_FILE).write_bytes(corrupted)
        with pytest.raises(MinitxError, match="does not match the fingerprint"):
            read_precomputed(tmp_path)


def test_serialize_then_deserialize_gives_same_parts():
    lm = tiny_lm()
    entries, arrays, indices = serialize(model=lm.model)
    again = deserialize("here", json.loads(json.dumps(entries)), arrays)[indices["model"]]
    assert repr(again) == repr(lm.model)
    assert again.stack.blocks[0].attn.qkv.q.w is lm.model.stack.blocks[0].attn.qkv.q.w


# The command -------------------------------------------------------------------------------------


def test_command_writes_loadable_model(run, workdir):
    flags = ["--fold-norms", "--ffn-skip", "threshold=0.9"]
    status, out, err = run("precompute", "out", "-m", "toy", *flags)
    assert (status, out) == (0, "") and "out: 0." in err and "offline work took" in err
    direct = minitx.load("toy", fold_norms=True, ffn_skip={"threshold": 0.9})
    lm = minitx.load("out")
    assert repr(lm.model) == repr(direct.model) and lm.name == "out"
    assert lm.generate("Once", 20) == direct.generate("Once", 20)
    shown = run("show", "-m", "out")
    assert shown[1] == f"{direct.model}\n"
    assert "made by: minitx precompute -m toy --fold-norms --ffn-skip threshold=0.9" in shown[2]
    # Further techniques can be applied; one that is already applied is rejected.
    more = minitx.load("out", fuse_projections=True)
    both = minitx.load("toy", fold_norms=True, fuse_projections=True, ffn_skip={"threshold": 0.9})
    assert repr(more.model) == repr(both.model)
    status, _, err = run("show", "-m", "out", "--fold-norms")
    assert status == 2 and "fold_norms needs a part of type" in err


def test_command_with_invalid_input_is_one_line_error(run, workdir):
    for words, message in (
        ([], "OUT_DIR"),
        (["out", "-m", "toy"], "Expected at least one technique to precompute"),
        (["toy", "-m", "toy", "--fold-norms"], "toy already exists"),
        (["toy/config.json/x", "-m", "toy", "--fold-norms"], "cannot be written"),
        (["out", "-m", "nowhere", "--fold-norms"], "no model 'nowhere'"),
    ):
        status, out, err = run("precompute", *words)
        assert (status, out) == (2, "") and message in err and err.count("\n") == 1, words
    assert not os.path.exists("out")


def test_tokenizer_is_copied(run, workdir, tmp_path):
    tiny_folder(tmp_path / "m", tokenizer=False)
    status, _, _ = run("precompute", "out", "-m", str(tmp_path / "m"), "--fold-norms")
    assert status == 0 and minitx.load("out").tokenizer is None
    tokenizer = str(workdir / "toy" / "tokenizer.json")
    run("precompute", "text", "-m", str(tmp_path / "m"), "--tokenizer", tokenizer, "--fold-norms")
    assert minitx.load("text").tokenizer.encode("once") == TOKENIZER.encode("once")
