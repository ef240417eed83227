"""Random sets of techniques with random options, and the laws that every set keeps.

The contract runs a small sample (``sample``) that is always the same. To search further:

    python tests/random_sets.py 1000 7            1,000 sets, drawn with seed 7; prints what fails
    python tests/random_sets.py 1000 7 a3 dota    each with one of these techniques
    python tests/random_sets.py case 7-12 [...]   one of them again
"""

import os
import random
import sys
import tempfile
import traceback
import warnings
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from tiny import TOKENIZER, in_chunks, tiny_model

from minitx import fast
from minitx.errors import MinitxError, MinitxWarning
from minitx.lm import LM, load
from minitx.skip.semantic_cache import SemanticStore
from minitx.technique import Option, Technique, apply, decides, find, techniques
from minitx.tree import walk

# Kinds of blocks that no family has by itself.
GROUPED = dict(width=24, heads=4, kv_heads=2, head_width=8)
MODELS = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "skipless": ("skipless", {}),
    "skipless parallel": ("skipless", dict(parallel=True)),
    "grouped heads, biases": ("llama", GROUPED | dict(qkv_bias=True)),
    "grouped heads, learned positions": ("gpt2", GROUPED | dict(tied=False)),
    "one key head, tied": ("llama", dict(heads=4, head_width=4, rope_width=4, tied=True)),
    "serial gpt_neox, relu": ("gpt_neox", dict(parallel=False, activation="relu")),
    "heads wider than the model": ("gpt2", dict(heads=3, kv_heads=3, head_width=12)),
}
SHIPPED = ("stories-relu", "stories-parallel", "stories-draft")
SMALL = 100  # numbers in a matrix that counts as large, where a case asks for large matrices


class Case(NamedTuple):
    """One random set: a model, techniques with options, and what is run."""

    name: str  # SEED-NUMBER
    model: str
    large: bool  # matrices count as large, so they are column-major
    wanted: dict  # options of each technique
    ids: np.ndarray  # (40,)

    def __str__(self) -> str:
        said = ", ".join(f"{name}={options}" for name, options in self.wanted.items())
        return f"{self.name}: {self.model}{' (large)' if self.large else ''}: {said}"


# Drawing -----------------------------------------------------------------------------------------


def draw_case(seed: int, number: int, one_of=(), models=(*MODELS, *SHIPPED)) -> Case:
    rng = random.Random(f"{seed}-{number}")
    model = rng.choice(list(models))
    chosen = rng.sample(techniques(), rng.choice((1, 2, 2, 2, 3)))
    if one_of and not {t.name for t in chosen} & set(one_of):
        chosen[0] = find(rng.choice(one_of))
    wanted = {t.name: draw_options(t, rng) for t in chosen}
    tokens = rng.choice((258, 258, 4, 1))  # few different ones: many equal keys
    ids = np.array([rng.randrange(tokens) + 5 * (tokens < 9) for _ in range(40)])
    return Case(f"{seed}-{number}", model, rng.random() < 0.5, wanted, ids)


def draw_options(t: Technique, rng: random.Random) -> dict:
    """About half of the options, each from its declared range."""
    start = t.demo if rng.random() < 0.5 else {}
    drawn = {o.name: draw_value(o, rng) for o in t.options.values() if rng.random() < 0.5}
    few = {name: 1 for name in t.options if name in ("stories", "calibration")}
    return {**start, **drawn, **few}


def draw_value(option: Option, rng: random.Random):
    kinds = (int, float, bool)
    if option._kind() not in kinds and not option.choices():
        return option.default  # text: a file or a model
    if type(None) in getattr(option.type, "__args__", ()) and rng.random() < 0.25:
        return None
    if option.choices():
        return rng.choice(option.choices())
    if option._kind() is bool:
        return rng.random() < 0.5
    low = 0 if option.range is None or option.range.low is None else option.range.low
    high = None if option.range is None else option.range.high
    if option._kind() is int:
        most = low + 2 ** rng.randrange(7)
        return rng.randint(low, most if high is None else min(high, most))
    high = low + 4 if high is None else min(high, low + 100)
    found = rng.choice((low, high, *[rng.uniform(low, high)] * 3, rng.uniform(low, high) ** 2))
    return found if option.range is None or found in option.range else rng.uniform(low, high)


# Laws --------------------------------------------------------------------------------------------


@contextmanager
def large_matrices(large: bool):
    before, fast.LARGE = fast.LARGE, SMALL if large else fast.LARGE
    try:
        yield
    finally:
        fast.LARGE = before


def dense_model(name: str) -> LM:
    if name in SHIPPED:
        return load(name, dtype=np.float64)
    family, changes = MODELS[name]
    return LM(tiny_model(family, dtype=np.float64, **changes), TOKENIZER)


def try_case(case: Case) -> str:
    """What is wrong with the case, in words; "" if nothing is, "refused: ..." for a refusal."""
    with large_matrices(case.large), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", MinitxWarning)
        try:
            lm = apply(dense_model(case.model), case.wanted)
        except MinitxError as error:
            bad = "\n" in str(error) or len(str(error)) > 600
            return f"unclear refusal: {error}" if bad else f"refused: {error}"
        try:
            return broken_law(lm, case.ids)
        except MinitxError as error:  # only a forced rewind may be refused, which is tried inside
            return f"refuses when it runs: {error}"


def broken_law(lm: LM, ids, prompt: int = 12, new: int = 12) -> str:
    """The first law that the model breaks on these ids, in words; "" if it keeps all. As generation
    does it, the first ``prompt`` ids run at once and the others one by one."""
    steps = (prompt, *[1] * (len(ids) - prompt))
    once = in_chunks(lm, ids, steps)
    scale = abs(once).max()
    if once.dtype != np.float64:
        return f"logits are {once.dtype}"
    if not np.isfinite(once).all():
        return "logits are not finite"
    if (in_chunks(lm, ids, steps) != once).any():
        return "the same steps give other logits"
    if decides(lm.model) == "sequence":
        if abs(in_chunks(lm, ids, (prompt, len(ids) - prompt)) - once).max() > 1e-9 * scale:
            return "the steps after the prompt make a difference"
    if decides(lm.model) == "token":
        for sizes in ((len(ids),), (7, len(ids) - 9, 2), (1,) * len(ids)):
            if abs(in_chunks(lm, ids, sizes) - once).max() > 1e-9 * scale:
                return f"steps of {sizes[:3]}... and of {steps[:3]}... give different logits"
    return broken_rewind(lm, ids, steps, once) or broken_batch(lm, ids, prompt, new)


def broken_rewind(lm: LM, ids, steps, once) -> str:
    """Undo the last step, of six other tokens, always; then go further back, if that is not
    refused, and repeat what came there."""
    prompt, at = steps[0], len(ids) - 6
    for back_to in (at, (prompt + at) // 2, 0):
        state = lm.model.new_state()
        in_chunks(lm, ids[:at], steps[: at - prompt + 1], state)
        lm.model((ids[-6:] + 1) % 258, state)  # to be forgotten
        state.rewind(at)
        try:
            state.rewind(back_to)
        except MinitxError as error:
            if back_to == 0 or "\n" in str(error):
                return f"cannot rewind: {error}"
            back_to = at
        again = steps if back_to == 0 else (1,) * (len(ids) - back_to)
        found, expected = in_chunks(lm, ids[back_to:], again, state), once[back_to:]
        # Not bit for bit: a layer that was deferred may have run in the step that was undone.
        if abs(found - expected).max() > 1e-9 * abs(once).max():
            return f"replayed from {back_to}, logits differ"
    return ""


def broken_batch(lm: LM, ids, prompt: int, new: int) -> str:
    """The same prompt twice, and two shorter ones."""

    def generate(lm: LM, *arguments, **options):
        """From an empty semantic cache, which gives the answers of other prompts."""
        for _, node in walk(lm):
            if type(node) is SemanticStore:
                node.forget()
        return lm.generate(*arguments, **options)

    first, *shorter = (part.tolist() for part in (ids[:prompt], ids[-3:], ids[-9:-4]))
    alone = [generate(lm, p, new) for p in (first, *shorter)]
    if generate(lm, [first, first], new) != [alone[0], alone[0]]:
        return "a batch of the same prompt twice differs from the prompt alone"
    if generate(lm, [first, first, *shorter], new) != [alone[0], *alone]:
        return "rows of a ragged batch differ from the prompts alone"
    options = dict(temperature=1.0, top_k=5)
    sampled = [generate(lm, first, new, seed=seed, **options) for seed in (3, 4)]
    if generate(lm, [first, first], new, seed=3, **options) != sampled:
        return "sampled rows differ from the prompts alone"
    return ""


# Searching ---------------------------------------------------------------------------------------


def report(case: Case) -> str:
    try:
        return try_case(case)
    except Exception:
        return traceback.format_exc(limit=-4)


def main(count: str, seed: str = "0", *one_of: str) -> None:
    numbers = range(int(count)) if count != "case" else [int(seed.partition("-")[2])]
    refused = 0
    for number in numbers:
        case = draw_case(int(seed.partition("-")[0]), number, one_of)
        found = report(case)
        refused += found.startswith("refused")
        if found and (count == "case" or not found.startswith("refused")):
            print(f"{case}\n    {found}", flush=True)
    print(f"{len(numbers)} cases, {refused} of them refused")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINITX_CACHE"] = folder  # not the user's
        main(*sys.argv[1:])
