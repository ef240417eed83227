"""``minitx compare --all``: a row for every technique, whatever becomes of the others."""

import json
import os
import time

import pytest
from tiny import tiny_lm

from minitx import technique as module
from minitx.calibration import calibration_ids
from minitx.errors import MinitxError
from minitx.lab import compare_all as lab
from minitx.lab.compare import Workload
from minitx.lab.compare_all import compare_all
from minitx.technique import find, technique, techniques
from minitx.text import Text

TEXT = Text("The balance of once and twice: a fence, a pond, and a stone. " * 20, "pond.txt")
WORK = Workload(text=TEXT, tokens=60, prompts=1, rounds=1)


@pytest.fixture
def troubled(monkeypatch):
    """Techniques that refuse, fail, hang, and end their process."""
    module.techniques()  # all are imported: one that is later would be forgotten with the copy
    monkeypatch.setattr(module, "REGISTRY", dict(module.REGISTRY))

    def refuses(lm):
        raise MinitxError("refuses needs another model.")

    def fails(lm):
        raise KeyError("a bug")

    def hangs(lm):
        time.sleep(60)

    def dies(lm):
        os._exit(9)

    made = (refuses, fails, hangs, dies)
    for function in made:
        technique(level="ffn", exact=False, neutral=None)(function)
    known = module.names() | {f.__name__: "minitx.technique" for f in made}
    monkeypatch.setattr(module, "names", lambda: known)
    return [find(f.__name__) for f in made]


def test_trouble_in_one_technique_costs_its_own_row_only(troubled):
    chosen = [*troubled, find("layer_skip")]
    found = compare_all(tiny_lm(), WORK, bar=False, time_limit=3, chosen=chosen)
    refuses, fails, hangs, dies, last = found.rows
    assert refuses.reason == "refuses needs another model."
    assert fails.reason.startswith("failed: KeyError")
    assert hangs.reason.startswith("given up after 3 s") and hangs.seconds < 30
    assert dies.reason.startswith("its process ended without a result")
    assert last.reason == "" and last.multiply_adds < 1 and last.agreement < 1
    text = str(found)
    assert max(map(len, text.splitlines())) <= 100, "the table must fit 100 columns"
    assert "--hangs: given up" in text and "pond.txt, 60 tokens" in text


def test_ctrl_c_keeps_the_rows_so_far(run, workdir, monkeypatch):
    few = [find(name) for name in ("fold_norms", "shrink", "quantize")]
    real = lab.in_own_process

    def interrupted(known, technique, *rest):
        if technique.name == "shrink":
            raise KeyboardInterrupt
        return real(known, technique, *rest)

    monkeypatch.setattr(lab, "techniques", lambda: few)
    monkeypatch.setattr(lab, "in_own_process", interrupted)
    (workdir / "pond.txt").write_text(TEXT.content)
    words = "compare", "--all", "-m", "toy", "--text", "pond.txt", "--tokens", "60"
    status, out, _ = run(*words)
    assert status == 130 and "--fold-norms  " in out
    assert "--shrink: stopped" in out and "--quantize: stopped" in out


def test_rows_of_all_techniques_are_figures_or_a_reason():
    for count in (16, 32):  # encoded once, not in the process of each technique
        calibration_ids("a technique", tiny_lm(), count)
    found = compare_all(tiny_lm(), WORK, bar=False)
    assert [row.flag for row in found.rows] == [t.flag for t in techniques()]
    rows = {row.flag: row for row in found.rows}
    failed = [row for row in found.rows if row.reason.startswith(("failed", "its process"))]
    assert not failed, f"a technique fails on a model that it should fit or refuse: {failed}"
    assert "learned positions" in rows["--merge-embeddings"].reason
    exact = rows["--fold-norms"]
    assert exact.agreement == 1 and abs(exact.added_loss) < 1e-4 and exact.multiply_adds == 1
    assert rows["--quantize"].memory < 1 and rows["--quantize"].weight_bytes < 1
    (use,) = rows["--prune"].calibrated
    assert use == "prune calibrated on 16 stories (grade full, calibration split)"
    text = str(found)
    assert max(map(len, text.splitlines())) <= 100
    assert "--fold-norms  " in text and json.dumps(found.as_dict())


def test_command_prints_a_table_or_json_and_takes_no_other_flags(run, workdir, monkeypatch):
    few = [find("fold_norms"), find("merge_embeddings")]
    monkeypatch.setattr("minitx.lab.compare_all.techniques", lambda: few)
    (workdir / "pond.txt").write_text(TEXT.content)
    words = "compare", "--all", "-m", "toy", "--text", "pond.txt", "--tokens", "60"
    status, out, err = run(*words, "--calibrate", "pond.txt")
    assert status == 0 and "--fold-norms" in out and "--merge-embeddings: " in out and err == ""
    assert "calibrate do so on pond.txt" in " ".join(out.split())
    status, out, _ = run(*words, "--json")
    assert json.loads(out)["rows"][0]["flag"] == "--fold-norms"
    status, _, err = run("compare", "--all", "--prune")
    assert status == 2 and "give no other flags" in err
