"""``minitx check``: run a model beside its reference outputs and print how they compare.

The same text is run in float32 and in float64, and the numbers after each stage (embedding, every
block, last norm, logits) are compared with those of another framework. Compared too: a greedy
continuation token by token, which alone uses the cache, and the tokenizer's ids. What was found is
judged in ``comparison.py``; the stored outputs are read by ``reference.py``.
"""

import json
from collections.abc import Callable

import numpy as np

from minitx.checkpoints.find import locate, name_of, shipped
from minitx.errors import MinitxError
from minitx.lab.comparison import ALLOWED, BUG, Comparison, Stage
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
Each model reads a text, and the numbers after every stage are compared with those that another
framework computed from the same weights. "error" is the largest difference, "relative" the same
divided by the stage's largest value. As rounding pass {ALLOWED["float32"]:.0e} in float32 and \
{ALLOWED["float64"]:.0e} in float64.
"""


def check_models(names: list[str], as_json: bool = False, folder=None) -> int:
    """Print how models compare with their references in ``folder`` (default: the checkout's).

    names: shipped models, folders of models, or random models of the references; if empty, all that
    are shipped, and then the random ones, in a line each unless there is a bug.
    Returns 1 if there is a bug, else 2 if a model could not be checked, else 0: also where no other
    framework has such a model, which is said.
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
    """There is nothing to compare a model with, and there cannot be."""


class Excuse:
    """In the place of a comparison that could not be made: the sentence that says why."""

    def __init__(self, name: str, explanation: str, verdict: str = NOT_CHECKED):
        self.name, self.explanation, self.verdict = name, explanation, verdict

    def as_dict(self) -> dict:
        return {"name": self.name, "verdict": self.verdict, "explanation": self.explanation}


def _check_or_excuse(name: str, folder) -> Comparison | Excuse:
    try:
        return check_model(name, folder)
    except NoOtherFramework as error:
        return Excuse(name, str(error), NO_OTHER)
    except MinitxError as error:  # the other models are still worth checking
        return Excuse(name, str(error))


def _text(result: Comparison | Excuse, in_full: bool) -> str:
    if isinstance(result, Excuse):
        sign = "[??]" if result.verdict == NOT_CHECKED else "[--]"
        return f"{sign}   {result.name}: not checked. {result.explanation}\n"
    return f"{result}\n" if in_full or result.verdict == BUG else result.line()


# Running -----------------------------------------------------------------------------------------


def check_model(name: str, folder=None) -> Comparison:
    """Compare one model; names as in ``check_models``.

    Raises MinitxError if there is no such model, if it has no reference, or if its reference was
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
                f"{known} is skipless (no residual adds, no norms): no other framework has such "
                "models to compare it with. Its parts are those of the other models."
            )
        raise MinitxError(
            f"There are no reference outputs for {known}; there are for {', '.join(references)}."
        )
    reference = read_reference(references[known])
    _need_same_weights(reference, files_about(path))
    return compare(reference, lambda dtype: load(path, dtype=dtype).model, load(path).tokenizer)


def _need_same_weights(reference: Reference, found: dict) -> None:
    if found["weights"] != reference.about.get("weights"):
        raise MinitxError(
            f"{reference.name}: these are not the weights that its reference was made from; "
            f"{remake(reference.name)}."
        )


def compare(reference: Reference, make: Callable[[str], Transformer], tokenizer=None) -> Comparison:
    """Compare ``make("float32")`` and ``make("float64")``, two copies of a model, with a reference.

    Raises MinitxError if the sizes of the model are not those of the reference.
    """
    largest = {name: np.abs(x).max() for name, x in reference.stages("float64").items()}
    errors: dict[str, dict[str, float]] = {name: {} for name in largest}
    greedy = {}
    for dtype in DTYPES:
        model = make(dtype)
        _need_same_sizes(reference, model)
        with np.errstate(all="ignore"):  # NaN and infinity are reported, with their place
            ours = run_stages(model, reference.ids)
            for name, theirs in reference.stages(dtype).items():
                errors[name][dtype] = float(np.abs(ours[name][reference.rows] - theirs).max())
            greedy[dtype] = _same_tokens(reference, model)
    stages = [Stage(name, float(largest[name]), errors[name]) for name in largest]
    c = model.config
    title = f"{c.family}, {c.layers} blocks of width {c.width}, vocabulary {c.vocab_size}"
    return Comparison(reference, title, stages, greedy, _wrong_text(reference, tokenizer))


def _need_same_sizes(reference: Reference, model: Transformer) -> None:
    for name, wanted in reference.sizes.items():
        found = getattr(model.config, name)
        if found != wanted:
            raise MinitxError(
                f"{reference.name}: the model has {name} = {found} but its reference has {wanted}; "
                f"{remake(reference.name)}."
            )


def run_stages(model: Transformer, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The numbers after each stage of one pass over ids (T,): (T, D), of the logits (T, V)."""
    recorded, hidden = record(model)
    last = model.norm(recorded.hidden(ids))
    embedding = model.embed(ids, slice(0, len(ids)))
    return dict(zip(stage_names(len(hidden)), [embedding, *hidden, last, model.head(last)]))


def _same_tokens(reference: Reference, model: Transformer) -> int:
    """How many greedy tokens are the reference's, up to the first that is not."""
    ids, state = reference.prompt.tolist(), model.new_state()
    for same, expected in enumerate(reference.greedy.tolist()):
        # Unlike next_argmax, this also goes on with NaN, which is for the verdict to report.
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
