"""Every tutorial runs by itself, in a fresh interpreter, quickly and in silence on stderr, and it
shows what it sets out to show. The scripts assert their own claims; here is the view from outside.
"""

import ast
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted((ROOT / "tutorials").glob("*.py"))
NAMES = [path.name for path in TUTORIALS]
COLUMNS, CPU_SECONDS = 100, 20

# Lines (regular expressions) that each tutorial has to print, in this order.
SHOWS = {
    "01_from_token_to_text.py": [
        r"141 characters are \d+ tokens: ",
        r"our first block against the model's: largest difference \d\.\de[-+]\d\d$",
        r"after block +\d+: ",
        r"The five likeliest words",
        r" 1 def flat_forward\(ids, W, c\):",
        r"float64: flat against model, error \d\.\de-1[3-9] .*\(tolerance 1e-12\) - equal$",
        r"float32: flat against model, error \d\.\de-\d\d .*\(tolerance 1e-05\) - equal$",
        r"Transformer$",
        r"  line +\d+  embed +TokenEmbedding\(",
        r"  line +\d+  attn\.attend +Attend\(",
        r"  line +\d+  head +TiedHead\(",
        r"Block \d+, head \d+: the last row gives \d+% to park",
        r"     the \|[ .,:=+*#%@-]+$",
        r"\d+ new tokens; lm\.generate gives the same\.$",
        r"temperature 0 +1 +1\.0 +100%$",
        r"temperature 1, top_k 5 +5 ",
    ],
    "02_the_cache_and_the_cost_of_a_token.py": [
        r"48 new tokens after 30, the same both ways\.",
        r" +1 of +1 +[\d,]+ ",
        r" +100 of +300 +[\d,]+ ",
        r"Counted from the arrays that arrived: the formulas give exactly the same\.$",
        r"weights +\d+\.\d\d MB #+$",
        r"This machine reads \d+\.\d GB/s",
        r" +64 +16\.00 ",
        r"chunks of  1: error .* - equal$",
        r"chunks of  7: error .* - equal$",
        r"\.\.\. Where is Anna\? Anna is in the >>>",
        r" +512 +[\d,]+ #+ ",
        r"projections +\d+% +\d+%   ",
        r"No part is everything: ",
    ],
    "03_before_the_first_token.py": [
        r"q of block 0 in float64: error \d\.\de-1[5-9], allowed 1e-14$",
        r"v of block 0 in float32: error \d\.\de-0[6-9], allowed 1e-05$",
        r"Offline: for each matrix W ",
        r"-     norm: RMSNorm\(",
        r"\+     norm: WeightlessRMSNorm\(",
        r"logits of \d+ tokens: error .* in float32, \d\.\de-1[3-9] in float64$",
        r"The greedy text is the same: ",
        r"\+ +qkv: FusedQKV\(",
        r" +(\d+) products in the blocks, ([\d,]+) multiply-adds$",
        r" +256 rows  gate, up +\d+\.\d\d (gain|loss|no clear difference)$",
        r"\+ FirstBlock$",
        r"  stack\.blocks\.0 +[\d,]+ +[\d,]+  #+\.+$",
        r"  stack\.blocks\.1 +[\d,]+ +[\d,]+  #+$",
        r"Saved: D A = [\d,]+, \d+\.\d% of the work of a token\.$",
        r"  L=32  at most   3%   stories +\d\.\d% #* +stories-parallel +\d\.\d% #+",
        r"  x entering block 0 +0\.000 ",
        r"  q in block 0, before positions +0\.000 ",
        r"  q in block 0, turned by its position +(?!0\.000)\d\.\d{3} ",
        r"  x entering block 1 +(?!0\.000)\d\.\d{3} ",
        r"all three +[\d,]+ +[\d,]+ +\d\.\de-\d\d +\d+\.\d\d ",
        r"none +\d\.\de-0[6-9] #+ +\d\.\de-1[3-9] #+ +yes +yes$",
        r"one number wrong by 1/10,000 .* NO: caught$",
        r"the gain of one norm forgotten .* NO: caught$",
        r"The gain forgotten, on fresh random weights: error \d\.\de-1[3-9]\. The check passes",
    ],
    "04_knowing_when_to_stop.py": [
        r"  block  1  \S+ +\S+$",
        r"  the story bed +kitchen ",
        r"      1 \| # # # ",
        r"  block  1( +\d+%)+ +\d\.\d{3} #+$",
        r"Asked [\d,]+ times, after blocks 2 to \d+: ",
        r" +gap( +\d+\.\d%){5}$",
        r" +saturation( +\d+\.\d%){5}$",
        r" +probe( +\d+\.\d%){5}$",
        r"Sure and wrong: block 2 says ",
        r"\.\.\. a girl named Anna\. Anna >>>",
        r"Left after: \{2: \d+, ",
        r"  dense .* 100\.0%  \+0\.0000$",
        r"  zeros: broken on purpose .* \d+\.\d%  [+-]\d\.\d{4}$",
        r"  gap 0\.95 .* \d+\.\d%  [+-]\d\.\d{4} +[+-]\d\.\d{4}$",
        r"  probe 0\.7 .* \d+\.\d%  [+-]\d\.\d{4} +[+-]\d\.\d{4}$",
        r" +\d+% +\d+% of the work$",
        r"a, b, \.\.\.: lots; A, B, \.\.\.: signs, in their order; \d of 6 beat lots\.$",
        r"  cosine, quantile 0\.8 .* \d+\.\d%  [+-]\d\.\d{4} +[+-]\d\.\d{4}$",
        r"a, b, \.\.\.: .*; \d of 2 beat lots\.$",
        r"One row: a block \d+ us, gap \d+ us, saturation \d+ us, probe \d+ us$",
        r"  dense +0\.0% +1\.00 -$",
        r"  gap 0\.95 +-?\d+\.\d% +\d+\.\d\d (gain|loss|no clear difference|-)$",
        r"  gap 0\.98: +\d+\.\d% changed in 50 texts, p = [01]\.\d{4} (passes|fails, and ends it)$",
        r"Chosen: \S+ \(1\.1: nobody leaves\)\. ",
        r"  first p-value small, else stop ",
    ],
    "05_which_keys_matter.py": [
        r"1\. \d+ keys, and how many of them matter$",
        r"Block \d+, head \d+ gives \d+\.\d% of its weight to the answer\.$",
        r"weight   \|[ .,:=+*#%@-]+\|$",
        r"    1 to  1 keys +\d+ #*$",
        r"   8( +\d+\.\d%){6}$",
        r" +q \. k_j, exact( +-?\d+\.\d\d){4} +8$",
        r" +codes of 2 bits( +-?\d+\.\d\d){4} +\d$",
        r" +\|q\| \|k\| cos\(angle\)( +-?\d+\.\d\d){4} +\d$",
        r" +sums, M = 1, 1 > 0( +-?\d+\.\d\d){4} +\d$",
        r" +sums, M = 32, \d+ > 0( +-?\d+\.\d\d){4} +\d$",
        r" +(post-hoc|trained) detector( +-?\d+\.\d\d){4} +\d$",
        r" +All heads: of the 8 nearest, \d\d% are among the 8 best\.$",
        r" +- \|q\^ - k\^\|( +-?\d+\.\d\d){4} +8$",
        r" +All heads: of the 8 nearest, 100% are among the 8 best\.$",
        r"  d = 32: sure after 100%; ",
        r"oracle   \|[ #]+\| +\d+\.\d%  8$",
        r"window   \|[ #o-]+\| +\d+\.\d%  8$",
        r"oracle   \|[ #]+\| +\d+\.\d%  8$",
        r"All heads: oracle \d+%; codes \d+%; ELSA \d+%; A3 \d+%; DOTA \d+%; LSH \d+%; window ",
        r"dense +\S+ +\d +100\.0% +1\.00 +1\.00 +1\.00$",
        r"linear +\S+ +\d +12\.\d% +0\.\d\d +0\.\d\d +\d+\.\d\d$",
    ],
    "06_fewer_weights_fewer_bits.py": [
        r"\[1 0\] \[1 1 2 0\] +\[1 1\] \[ 1  0  4 -3\]$",
        r"The same product with 16 numbers, and with 12\.$",
        r"shrink( +\d+\.\d+){3} .* +\d+\.\d\d (gain|loss|no clear difference)$",
        r"  \+ +out: ShrunkOutput\(",
        r"enlarges what is rounded\. In float64, logits are off by \de-(1\d|09)\.$",
        r"Not for this model: slim_attention needs keys for each query head",
        r"Next model: cond\(W_k\) is \d+, values by hand off by \de-\d\d\.$",
        r"slim_attention +\d",
        r"absorb_products +\d",
        r"remove_weights +\d",
        r"  - +q: Linear\(",
        r"  \+ +out: MergedIntoFFN$",
        r"8 bits, 1 scale\(s\) +\[127 -49  14   3\] +0\.900  -0\.347 ",
        r"4 bits, 1 scale\(s\) +\[ 7 -3  1  0\] .*, off by 0\.021$",
        r"4 bits, 2 scale\(s\) +\[ 7 -3  7  1\] .*, off by 0\.010$",
        r"4, one scale +\d",
        r"4, run=load +\d",
        r"cache, 4 bits +\d",
        r"  \+ +kept: Codes\(codes .* bits=4\)$",
        r"2 of 4 zeros +\d",
        r"  \+ +down: Linear\(w \d+x\d+ 50% zeros\)$",
        r"  \+ +gate: LowRank$",
        r" \d\.\d\d \|.*D  \|.*D$",
        r"x \\ w  -1,-1 ",
        r"\[1, -1, 0, 1\] \. \[1, 1, -1, 1\] = 0 \+ 1 = 1$",
        r"lut, product +\d",
        r"function_tables +\d",
        r"positives first( +-?\d\.\d\d){12}$",
        r"Below 0 for certain after \d+ of 12 products; as stored, after the last\.$",
        r"separate_signs +\d",
        r"minitx precompute small --fold-norms --first-layer --quantize ",
        r"small: \d\.\d\d MB; \d+\.\d\d s of work that is done for good$",
        r"precomputed\.json [\d,]+ bytes; precomputed\.safetensors [\d,]+ bytes; tokenizer\.json ",
        r"Loading takes \d\.\d+ s; the logits are identical, bit for bit\.$",
    ],
}


class Run(NamedTuple):
    status: int
    out: str
    err: str
    cpu: float  # seconds in user and system mode; unlike the time on the clock, not others' doing
    files: list  # what was left in the working directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """``run(name)`` gives the run of a tutorial. All are started by the first, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        started = {
            name: pool.submit(
                run_tutorial, ROOT / "tutorials" / name, tmp_path_factory.mktemp("cwd")
            )
            for name in NAMES
        }
        yield lambda name: started[name].result()


def run_tutorial(path: Path, folder: Path) -> Run:
    """In an empty folder, every warning an error, one BLAS thread, at most a minute."""
    own = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "utf-8"}
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", TIMED, str(path)],
        cwd=folder,
        env=os.environ | own | threads,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    text, _, cpu = done.stdout.rpartition("\n")
    seconds = float(cpu) if done.returncode == 0 else 0.0
    return Run(done.returncode, text, done.stderr, seconds, sorted(folder.iterdir()))


# Runs a script, and says in a last line how long it has computed.
TIMED = """
import runpy, sys, time
runpy.run_path(sys.argv[1], run_name="__main__")
print()
print(time.process_time(), end="")
"""


def test_every_tutorial_is_named_by_its_number_and_is_checked_here():
    assert NAMES, "there are no tutorials"
    assert [name[:3] for name in NAMES] == [f"{n:02}_" for n in range(1, len(NAMES) + 1)]
    assert set(SHOWS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_to_its_end_in_silence(runs, name):
    run = runs(name)
    assert run.err == ""
    assert run.status == 0


@pytest.mark.parametrize("name", NAMES)
def test_it_shows_what_it_sets_out_to_show_in_that_order(runs, name):
    lines = iter(runs(name).out.splitlines())
    for wanted in SHOWS[name]:  # `lines` goes on where the last one was found
        assert any(re.match(wanted, line) for line in lines), f"not found (or not there): {wanted}"


@pytest.mark.parametrize("name", NAMES)
def test_it_is_quick_and_writes_nothing(runs, name):
    run = runs(name)
    assert run.cpu < CPU_SECONDS
    assert run.files == []


@pytest.mark.parametrize("name", NAMES)
def test_its_text_is_not_too_wide(runs, name):
    assert [line for line in runs(name).out.splitlines() if len(line) > COLUMNS] == []


@pytest.mark.parametrize("name", NAMES)
def test_it_is_made_of_titled_cells_and_ends_with_exercises(name):
    source = (ROOT / "tutorials" / name).read_text("utf-8")
    cells = re.findall(r"^# %%(.*)$", source, re.MULTILINE)
    assert len(cells) >= 5
    assert all(title.startswith(" ") and title.strip() for title in cells)
    assert cells[-1] == " Exercises"
    assert len(re.findall(r"^# \d\. ", source.rpartition("# %%")[2], re.MULTILINE)) >= 3
    assert ast.get_docstring(ast.parse(source))


def test_the_flat_forward_is_numpy_and_nothing_else():
    """No class, no function of minitx: the only names it knows are its own, NumPy, and builtins."""
    source = (ROOT / "tutorials" / NAMES[0]).read_text("utf-8")
    flat = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "flat_forward"
    )
    names = [node for node in ast.walk(flat) if isinstance(node, ast.Name)]
    own = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    own |= {argument.arg for argument in flat.args.args}
    assert {node.id for node in names} - own == {"np", "len", "range", "bool"}
    assert flat.end_lineno - flat.lineno + 1 <= 40


def test_what_is_fused_or_looked_up_is_seen_in_the_counts(runs):
    """Fewer products and as many multiply-adds; then fewer of these, but for nothing else."""
    out = runs("03_before_the_first_token.py").out
    (many, same), (few, as_many) = re.findall(r"(\d+) products in the blocks, ([\d,]+)", out)
    assert int(few) < int(many) and same == as_many
    (saved,) = re.findall(r"^Saved: D A = ([\d,]+),", out, re.MULTILINE)
    rows = re.findall(r"^([a-z_]\w+|all three) +([\d,]+) +[\d,]+ +\d\.\de", out, re.MULTILINE)
    counts = {name: int(count.replace(",", "")) for name, count in rows}
    less = counts["dense"] - int(saved.replace(",", ""))
    assert counts == {
        "dense": counts["dense"],
        "fold_norms": counts["dense"],
        "fuse_projections": counts["dense"],
        "first_layer": less,
        "all three": less,
    }


def test_stopping_early_is_shown_with_its_price(runs):
    """What holds for any model that has learnt something: depth helps, signs say something, a hole
    in the cache harms, deferring saves less than copying; and luck is no guarantee."""
    out = runs("04_knowing_when_to_stop.py").out
    losses = re.findall(r"^  block +\d+(?: +\d+%)+ +(\d\.\d{3}) #", out, re.MULTILINE)
    assert float(losses[0]) > float(losses[-1]) and len(losses) > 2
    for sign in ("gap", "probe"):  # the surest half, and all
        (half, every) = re.search(
            rf"^ +{sign}(?: +\S+){{2}} +(\S+)% +\S+ +(\S+)%$", out, re.MULTILINE
        ).groups()
        assert float(half) >= float(every)
    prices = {
        name.strip(): (float(work), float(loss))
        for name, work, loss in re.findall(
            r"^  (\D+?|lot \S+) +(?: +(?:\d+|nan)%)+ +(\d+\.\d)%  ([+-]\d\.\d{4})",
            out,
            re.MULTILINE,
        )
    }
    copied, deferred = prices["fill=copy"], prices["fill=deferred"]
    assert copied[0] < deferred[0] < 100
    assert prices["zeros: broken on purpose"][1] > copied[1]
    assert 100 > prices["lot 0.9"][0] > prices["lot 0.7"][0] > prices["lot 0.4"][0]
    luck, small, first = (
        float(re.search(rf"^  {rule}\D* +(\d+\.\d)%", out, re.MULTILINE).group(1))
        for rule in ("any mean loss", "any small", "first p-value")
    )
    assert luck > small > first and first <= 5


def test_what_keeps_more_of_the_attention_is_seen_and_what_it_costs(runs):
    """Nothing beats the oracle, codes of four bits come near it, a far answer is out of a window's
    sight; angles are guessed too small once corrected; and what is left out is not counted."""
    out = runs("05_which_keys_matter.py").out
    (line,) = re.findall(r"^All heads: (oracle .*)$", out, re.MULTILINE)
    mass = {name: int(share) for name, share in re.findall(r"([\w]+) (\d+)%", line)}
    assert max(mass.values()) == mass["oracle"] and mass["codes"] > mass["oracle"] - 10
    assert min(mass["codes"], mass["ELSA"]) > max(mass["window"], mass["lots"])
    pictures = re.findall(r"^(\w+) +\|([ #o-]+)\| +(\d+\.\d)% +(\d+)$", out, re.MULTILINE)
    assert len(pictures) == 2 * len(mass)
    for _, marks, _, kept in pictures:
        assert marks.count("#") + marks.count("-") == int(kept)
        assert marks.count("#") + marks.count("o") == 8
    first = {name: float(share) for name, _, share, _ in pictures[: len(mass)]}
    assert first["oracle"] == max(first.values()) > first["window"]
    before, after = map(int, re.search(r"too small: (\d+)%, less theta_bias (\d+)%", out).groups())
    assert before < after
    for cost in re.findall(
        r"^(?:codes|ELSA|A3|DOTA|linear) .*% +(\d\.\d\d) +(\d\.\d\d) ", out, re.MULTILINE
    ):
        assert all(float(part) < 1 for part in cost)


def test_what_weights_cost_is_told_apart(runs):
    """Exact ones change no token; bits take less memory for the same work, zeros in an array gain
    nothing, packed ones memory alone; and what is cut out saves both, seen in the picture, too."""
    out = runs("06_fewer_weights_fewer_bits.py").out
    rows = {}  # the last table in which a name stands; all of the same model but for three
    for line in out.splitlines():
        if found := re.match(r"(.{17}) +(\d+\.\d+) +(\d+\.\d+) +(\d+\.\d+) +([\d,]+) ", line):
            name, *figures = found.groups()
            figures = [float(figure.replace(",", "")) for figure in figures]
            same = float(re.search(r" (\d+\.\d)%", line).group(1))
            rows[name.strip()] = (*figures, same)
    work, _, memory, cache, _ = dense = rows["dense"]
    for name in ("shrink", "slim_attention", "remove_weights", "order_products", "separate_signs"):
        assert rows[name][-1] > 99  # where two tokens are equally likely, rounding may decide
    assert rows["half zeros"][:4] == dense[:4]
    for name in ("8 bits", "4 bits", "half, packed"):
        assert rows[name][0] == work and rows[name][2] < memory
    assert rows["cache, 4 bits"][0] == work and rows["cache, 4 bits"][3] < cache
    for name in ("shrink", "neurons - 1/2", "rank, 80%"):
        assert rows[name][0] < work and rows[name][2] < memory
    pictures = [re.split(r"\|", line)[1:] for line in out.splitlines() if line[5:7] == " |"]
    assert len(pictures) == 13
    for left, right in pictures:
        assert "p" not in right or "p" not in left or right.index("p") > left.index("p")
    assert any("N" in left and "N" in right for left, right in pictures)
