"""``minitx check``: compare a model, stage by stage, with reference outputs.

The same text is run in float32 and float64, and the hidden states after each stage (embedding,
every block, final norm) and the logits are compared with those of Hugging Face transformers. Also
compared: a greedy continuation token by token, which exercises the KV cache, and the tokenizer's
ids. If a block is the first stage that differs, the comparison continues inside it, step by step
(norm, queries, keys, values, ...). ``comparison.py`` gives the verdict; ``reference.py`` reads the
stored outputs.
"""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from minitx.checkpoints.find import locate, name_of, shipped
from minitx.errors import MinitxError
from minitx.lab.comparison import ALLOWED, BUG, Comparison, Inside, Stage, compare_values
from minitx.lab.inside import STEPS, inside
from minitx.lab.layout import fit
from minitx.lab.reference import (
    DTYPES,
    Reference,
    files_about,
    find_references,
    read_reference,
    remake,
    seeded_about,
    seeded_model,
    stage_names,
)
from minitx.lm import load
from minitx.model import Transformer
from minitx.training.layerskip import record

INTRODUCTION = f"""\
Each model reads a text, and the values after every stage are compared with those that Hugging Face
transformers computed from the same weights. "error" is the largest absolute difference, "relative"
is the error divided by the stage's largest value. Errors up to these count as
rounding: {ALLOWED["float32"]:.0e} in float32, {ALLOWED["float64"]:.0e} in float64.
"""


def check_models(names: list[str], as_json: bool = False, folder=None) -> int:
    """Print how models compare with their references in ``folder`` (default: tests/reference).

    names: shipped models, model folders, or random models of the references; by default all shipped
    models, then the random ones in one line each, unless there is a bug. Returns 1 if there is a
    bug, else 2 if a model could not be checked, else 0 (also for a model that no other framework
    has, which is said).
    """
    chosen = names or list(dict.fromkeys([*shipped(), *find_references(folder)]))
    results = []
    if not as_json:
        print(INTRODUCTION)
    for name in chosen:
        results.append(_check_or_excuse(name, folder))
        if not as_json:
            print(_text(results[-1], in_full=bool(names) or not name.startswith("random-")))
    if as_json:
        print(json.dumps({"models": [result.as_dict() for result in results]}, indent=1))
    verdicts = [result.verdict for result in results]
    return 1 if BUG in verdicts else 2 if NOT_CHECKED in verdicts else 0


NOT_CHECKED, NO_OTHER = "not checked", "no other framework"


class NoOtherFramework(MinitxError):
    """No other framework has this kind of model, so there is no reference."""


class Excuse:
    """The result for a model that could not be compared: a sentence that says why."""

    def __init__(self, name: str, explanation: str, verdict: str = NOT_CHECKED):
        self.name, self.explanation, self.verdict = name, explanation, verdict

    def as_dict(self) -> dict:
        return {"name": self.name, "verdict": self.verdict, "explanation": self.explanation}


def _check_or_excuse(name: str, folder) -> Comparison | Excuse:
    try:
        return check_model(name, folder)
    except NoOtherFramework as error:
        return Excuse(name, str(error), NO_OTHER)
    except MinitxError as error:  # go on with the other models
        return Excuse(name, str(error))


def _text(result: Comparison | Excuse, in_full: bool) -> str:
    if isinstance(result, Excuse):
        sign = "[??]" if result.verdict == NOT_CHECKED else "[--]"
        return fit(f"{sign}   {result.name}: not checked. {result.explanation}\n", hanging=7)
    return f"{result}\n" if in_full or result.verdict == BUG else result.line()


# Running -----------------------------------------------------------------------------------------


def check_model(name: str, folder=None) -> Comparison:
    """Compare one model; names as in ``check_models``.

    Raises MinitxError if there is no such model, if it has no reference, or if the reference was
    made from other weights.
    """
    references = find_references(folder)
    if name.startswith("random-") and name in references:
        reference = read_reference(references[name])
        config, seed = reference.config, reference.seed
        _need_same_weights(reference, seeded_about(config, seed))
        return compare(reference, lambda dtype: seeded_model(config, seed, dtype))
    path = locate(name)
    known = name_of(path.resolve())
    if known not in references:
        if load(path).model.config.skipless:
            raise NoOtherFramework(
                f"{known} is skipless (no residual connections, no norms), which no other "
                "framework supports, so there is no reference. It has the parts of other models."
            )
        raise MinitxError(
            f"There are no reference outputs for {known}; choose from {', '.join(references)}."
        )
    reference = read_reference(references[known])
    _need_same_weights(reference, files_about(path))
    return compare(reference, lambda dtype: load(path, dtype=dtype).model, load(path).tokenizer)


def _need_same_weights(reference: Reference, found: dict) -> None:
    if found["weights"] != reference.about.get("weights"):
        raise MinitxError(
            f"{reference.name}: its reference was made from other weights; "
            f"{remake(reference.name)}."
        )


def compare(reference: Reference, make: Callable[[str], Transformer], tokenizer=None) -> Comparison:
    """Compare ``make("float32")`` and ``make("float64")``, two copies of a model, with a reference.

    Raises MinitxError if the sizes of the model are not those of the reference.
    """
    theirs = {dtype: reference.stages(dtype) for dtype in DTYPES}
    ours, greedy = {}, {}
    for dtype in DTYPES:
        model = make(dtype)
        _need_same_sizes(reference, model)
        with np.errstate(all="ignore"):  # NaN and Inf are reported in the table
            values = run_stages(model, reference.ids)
            greedy[dtype] = _same_tokens(reference, model)
        ours[dtype] = {name: x[reference.rows] for name, x in values.items()}
    stages = [
        compare_values(name, _each(ours, name), _each(theirs, name), reference.rows)
        for name in theirs["float64"]
    ]
    c = model.config
    title = f"{c.family}, {c.layers} blocks of width {c.width}, vocabulary {c.vocab_size}"
    found = Comparison(reference, title, stages, greedy, _wrong_text(reference, tokenizer))
    return replace(found, inside=compare_inside(reference, make, found.bug))


def _each(values: dict, name: str) -> dict[str, np.ndarray]:
    """The values of one stage by dtype."""
    return {dtype: values[dtype][name] for dtype in DTYPES}


def compare_inside(
    reference: Reference, make: Callable[[str], Transformer], bug: Stage | None
) -> Inside | None:
    """Compare the steps inside the block that is the first wrong stage; None if that is no block,
    or if the reference does not have them."""
    if bug is None or not bug.name.startswith("block ") or not reference.inside:
        return None
    block = int(bug.name.removeprefix("block "))
    with np.errstate(all="ignore"):
        ours = {dtype: inside(make(dtype), block, reference.ids) for dtype in DTYPES}
    steps = []
    for name, expected in reference.inside.items():
        if all(name in ours[dtype] for dtype in DTYPES):  # not, if another part is in its place
            found = {dtype: ours[dtype][name][reference.inside_rows] for dtype in DTYPES}
            theirs = dict.fromkeys(DTYPES, expected[block])
            steps.append(compare_values(name, found, theirs, reference.inside_rows, STEPS[name]))
    return Inside(bug.name, steps, reference.inside_rows.tolist())


def _need_same_sizes(reference: Reference, model: Transformer) -> None:
    for name, wanted in reference.sizes.items():
        found = getattr(model.config, name)
        if found != wanted:
            raise MinitxError(
                f"{reference.name}: the model has {name} = {found} but its reference has {wanted}; "
                f"{remake(reference.name)}."
            )


def run_stages(model: Transformer, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The values after each stage of one pass over ids (T,): (T, D), logits (T, V)."""
    recorded, hidden = record(model)
    last = model.norm(recorded.hidden(ids))
    embedding = model.embed(ids, slice(0, len(ids)))
    return dict(zip(stage_names(len(hidden)), [embedding, *hidden, last, model.head(last)]))


def _same_tokens(reference: Reference, model: Transformer) -> int:
    """The number of greedy tokens that match the reference, up to the first mismatch."""
    ids, state = reference.prompt.tolist(), model.new_state()
    for same, expected in enumerate(reference.greedy.tolist()):
        # Unlike next_argmax this accepts NaN, which the verdict reports.
        token = int(model.next_logits(ids, state).argmax())
        if token != expected:
            return same
        ids = [token]
    return len(reference.greedy)


def _wrong_text(reference: Reference, tokenizer) -> int | None:
    for i, (text, ids) in enumerate(reference.about.get("texts", [])):
        if tokenizer is None or list(tokenizer.encode(text)) != ids:
            return i
    return None
