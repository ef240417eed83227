"""Exercise 18: The budget (60 minutes)

The model `stories` needs about 2.7 million multiply-adds for each token that it writes. Make it
need fewer. You may use every technique of minitx, alone or together, with any options, or one of
your own. What counts is measured on stories that neither the model nor your recipe has seen:

    loss            at most 0.01 nats per token above the dense model's
    two-hop         at most 1 point fewer right answers to questions that combine two facts
    multiply-adds   as few per token as you can; at least 10 % fewer than the dense model

The third one is the ranking. Loss and answers are those of 120 stories that the model reads: every
token is predicted from the true text before it. Multiply-adds are counted, as in minitx compare,
while the model continues the first 32 tokens of 8 of the stories by 48 tokens. Those of small
integers count like those of floats, and so do additions of table entries.

Write recipe(). It returns the flags, as a dict of options by technique:

    def recipe():
        return {"head_prune": {"share": 0.1}, "fold_norms": {}}

This is what minitx.load("stories", **recipe()) takes. Ways to decode (speculative, ...) and answer
caches are out: they change how often the model runs, not what a token costs.

How to look for it: `minitx list` names the techniques, `minitx explain NAME` the options of one.
`minitx compare --head-prune share=0.1` measures a recipe, `minitx sweep NAME OPTION=a,b,c` an
option, `minitx frontier structure` many techniques at equal work. A combination costs about the sum
of its losses, so several cheap savings may beat a large one. The check takes about 10 seconds, for
slow techniques longer (at most 2 minutes). The ranking uses other stories than your own check, so
do not tune for single answers.

For a technique of your own, return a pair: the flags, and a function that takes the language model
with these flags and returns a changed one. (In this exercise your file may import minitx.) Parts
are replaced with ``wrap`` and ``swap`` of minitx/technique.py. This one skips some of the FFNs:

    from minitx.technique import wrap
    from minitx.tree import Part, part

    @part
    class NoFFN(Part):                          # a part is a frozen dataclass
        inner: Part                             # the FFN that it stands for

        def __call__(self, x, layer):           # x (..., T, D) -> what is added to the stream
            return 0 * x

    def without_two_ffns(lm):
        return wrap(lm, "ffn", lambda ffn, index: NoFFN(ffn) if index in (3, 4) else ffn)

    def recipe():
        return {}, without_two_ffns

Products inside the model's own parts are counted automatically; count what you multiply yourself:
minitx.ledger.count(multiply_adds). Your technique must keep three promises. The same prompt gives
the same text. A text that is run in chunks gives the same logits as in one pass (unless your part
has the attribute decides = "step"; then the stories are read token by token). After
state.rewind(n), the same tokens give the same logits again.

Sources: the techniques' papers; each ``minitx explain`` names them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

import minitx
from minitx.errors import MinitxError, abbreviate
from minitx.lab.compare import continue_all
from minitx.lab.evaluate import Report, Tally, encode, held_out, report, story_end
from minitx.lab.frontier.chart import chart
from minitx.lab.layout import table
from minitx.lab.reading import add_up
from minitx.learn.exercise import Exercise
from minitx.learn.verdict import Verdict
from minitx.lm import LM
from minitx.technique import apply, decides, find

STORIES = 120  # with about 115 two-hop questions
PROMPTS, PROMPT_TOKENS = 8, 32  # beginnings of stories that are continued, to count the work
MOST_LOSS, MOST_POINTS, LEAST_SAVING = 0.01, 1.0, 0.10
ROUNDING = 1e-9  # of what is compared with these


# solution
def recipe():
    """-> the flags {technique: options}, or a pair (flags, function from LM to LM)"""
    # The first layer's products from a table (exact), and a layer that is hardly missed.
    return {"first_layer": {}, "layer_skip": {"drop": "4"}}


# end of solution


# What a recipe does ------------------------------------------------------------------------------


def apply_recipe(dense: LM, made) -> tuple[LM, Callable | None]:
    """(the changed model, the student's own technique or None). MinitxError if it is no recipe."""
    flags, own = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(flags, dict) or (own is not None and not callable(own)):
        raise MinitxError(
            "recipe must return a dict of flags, such as {'head_prune': {'share': 0.1}}, or a pair "
            f"(flags, function from a model to a model); got {abbreviate(made)}."
        )
    for name in flags:
        if not isinstance(name, str):
            raise MinitxError(f"Expected names of techniques in the flags, got {abbreviate(name)}.")
        if find(name).level in ("decode", "answer"):
            raise MinitxError(
                f"{find(name).name} changes how often the model runs, not what a token costs; "
                "leave it out."
            )
    lm = apply(dense, flags)
    return (lm if own is None else with_own(lm, own)), own


def with_own(lm: LM, own: Callable) -> LM:
    changed = own(lm)
    if not isinstance(changed, LM):
        raise MinitxError(
            "The function in your recipe must return a language model, such as wrap(lm, ...) does; "
            f"got {abbreviate(changed)}."
        )
    if changed.decode is not lm.decode or changed.tokenizer is not lm.tokenizer:
        raise MinitxError("Your function may change lm.model only, not how it is decoded.")
    return changed


# The promises of a technique ---------------------------------------------------------------------

PROMPT = "Once upon a time, a girl sat"


def broken_promise(lm: LM) -> str | None:
    """Which promise a model in float64 breaks: a sentence, or None. (The library's own techniques
    have tests that say more.)"""
    if lm.generate(PROMPT, 8) != lm.generate(PROMPT, 8):
        return "The same prompt gives another text the second time: keep nothing between two calls."
    ids = lm.encode(PROMPT)
    if decides(lm.model) == "token":
        if not close(in_chunks(lm, ids, (3, 1, len(ids) - 4)), in_chunks(lm, ids, (len(ids),))):
            return (
                "A text in chunks gives other logits than in one pass: decide for each token from "
                "that token alone."
            )
    state = lm.model.new_state()
    lm.model(np.array(ids[:-1]), state)
    first = lm.model(np.array(ids[-1:]), state)
    state.rewind(len(ids) - 1)
    if not close(lm.model(np.array(ids[-1:]), state), first):
        return "After state.rewind, the same tokens give other logits."
    return None


def in_chunks(lm: LM, ids, sizes) -> np.ndarray:
    state, ends = lm.model.new_state(), np.cumsum(sizes)
    parts = [lm.model(np.array(ids[b - n : b]), state) for n, b in zip(sizes, ends)]
    return np.concatenate(parts)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(abs(a - b).max() <= 1e-9 * abs(b).max())


# The measurement ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A model on stories: its report, and multiply-adds per new token."""

    report: Report
    work: float


def measure(lm: LM, seed: int) -> Measured:
    """The report of reading all stories, and the work of continuing the beginnings of some, as
    ``minitx compare`` has it."""
    total, texts = Tally.empty(), encoded(seed)
    for text in texts:
        add_up(total, lm, text)
    prompts = [text.ids[:PROMPT_TOKENS] for text in texts[:PROMPTS]]
    new, counts = continue_all(lm, prompts, lambda: None)
    spent = counts.total()
    return Measured(report(total), (spent.multiply_adds + spent.additions) / sum(map(len, new)))


@cache
def encoded(seed: int) -> list:
    lm = minitx.load("stories")
    return encode(lm.tokenizer, held_out(lm, STORIES, seed=seed), end=story_end(lm))


@cache
def of_dense(seed: int) -> Measured:
    return measure(minitx.load("stories"), seed)


@cache
def score(function: Callable, seed: int) -> "Score":
    """The score of a recipe function; once for the verdict and for what is shown after it."""
    made = function()
    changed, own = apply_recipe(minitx.load("stories"), made)
    if own is not None:
        trouble = broken_promise(apply_recipe(minitx.load("stories", dtype=np.float64), made)[0])
        if trouble is not None:
            raise MinitxError(trouble)
    return Score.of(measure(changed, seed), of_dense(seed))


@dataclass(frozen=True)
class Score:
    """What a recipe needs and what it costs, beside the dense model."""

    work: float  # multiply-adds per token
    share: float  # of the dense model's
    loss: float  # nats per token, above the dense model's
    two_hop: float  # percent right
    points: float  # percent below the dense model's

    @classmethod
    def of(cls, found: Measured, dense: Measured) -> "Score":
        right, before = (100 * m.report.by_hops[2] for m in (found, dense))
        added = found.report.loss - dense.report.loss
        return cls(found.work, found.work / dense.work, added, right, before - right)

    def misses(self) -> list[str]:
        """By how much it misses what; empty if it passes."""
        found = []
        if not self.loss <= MOST_LOSS + ROUNDING:
            found.append(f"the loss by {self.loss - MOST_LOSS:.4f} nats")
        if not self.points <= MOST_POINTS + ROUNDING:
            found.append(f"the two-hop answers by {self.points - MOST_POINTS:.1f} points")
        if not 1 - self.share >= LEAST_SAVING - ROUNDING:
            missing = 100 * (LEAST_SAVING - 1 + self.share)
            found.append(f"the least saving of {LEAST_SAVING:.0%} by {missing:.1f} % of dense")
        return found

    def __str__(self) -> str:
        lines = [
            f"Multiply-adds per token: {self.work:,.0f}, {self.share:.3f}x of the dense model's.",
            f"Loss: {self.loss:+.4f} nats per token (at most +{MOST_LOSS:g}).",
            f"Two-hop answers: {self.two_hop:.1f} % right, {0 - self.points:+.1f} points (at most "
            f"-{MOST_POINTS:g}).",
        ]
        if self.misses():
            lines.append(f"It misses {', and '.join(self.misses())}.")
        return "\n".join(lines)

    def figures(self) -> dict[str, float]:
        """What grading ranks by. multiply_adds: the share of the dense model's. loss: in nats per
        token, above the dense model's. two_hops: right answers in percent, above the dense
        model's. per_token: multiply-adds."""
        return {
            "multiply_adds": float(self.share),
            "loss": float(self.loss),
            "two_hops": float(0 - self.points),
            "per_token": float(self.work),
        }


def judge(answer, seed: int) -> Verdict:
    found = score(answer.recipe, seed)
    return Verdict("wrong" if found.misses() else "passed", str(found), figures=found.figures())


# The chart ---------------------------------------------------------------------------------------

# Recipes of ours: flags, and what ``python -m minitx.learn.ex18_budget`` prints for them:
# share of the dense model's multiply-adds, added loss, two-hop points lost (seed 0).
REFERENCES = (
    ({"ffn_skip": {}}, 0.890, 0.0045, 0.0),
    ({"layer_skip": {}}, 0.881, 0.0009, 0.0),
    ({"cats": {}}, 0.874, 0.0012, 0.0),
    ({"teal": {}}, 0.789, 0.0088, 0.8),
    ({"layer_skip": {}, "cats": {}}, 0.771, 0.0021, 0.0),
    ({"memoize_ffn": {}}, 0.684, 0.0012, 0.0),
    ({"memoize_ffn": {}, "layer_skip": {}}, 0.626, 0.0021, 0.0),
    ({"memoize_ffn": {}, "head_router": {}, "first_layer": {}}, 0.619, 0.0019, -0.8),
)


def show(answer) -> str:
    found = score(answer.recipe, 0)
    entries = [("your recipe", found.share, found.loss, found.points)]
    entries += [(" + ".join(flags), *figures) for flags, *figures in REFERENCES]
    rows = [["", "multiply-adds", "loss", "two-hop"]]
    rows += [[name, f"{x:.3f}x", f"{y:+.4f}", f"{0 - z:+.1f}"] for name, x, y, z in entries]
    fewer = sum(share < found.share for _, share, _, _ in REFERENCES)
    return "\n".join(
        [
            str(found),
            f"Recipes of ours that need fewer: {fewer} of {len(REFERENCES)}.",
            "",
            "Added loss, in 1/1000 nats per token, against multiply-adds (the lower left is best):",
            chart({name: [(x, 1000 * y)] for name, x, y, _ in entries}, "of dense"),
            "",
            table(rows),
        ]
    )


EXERCISE = Exercise(
    title="The budget",
    minutes=60,
    difficulty="open",
    names=("recipe",),
    judge=judge,
    seconds=120,
    uses_minitx=True,
    hints=(
        "Where do the multiply-adds go? `minitx compare` prints them by part. Some techniques are "
        "exact and still save; take those first, and then what is approximate.",
        "minitx sweep head_prune share=0.1,0.2,0.3 --stories 60 shows how loss grows with saving. "
        "Do the same for layer_skip (drop=0,1,2,...), cats, teal, memoize_ffn and ffn_skip. Then "
        "combine two that work on different parts, each at a mild setting.",
    ),
    library="minitx/lab/sweep.py and minitx/lab/frontier/ (minitx sweep, minitx frontier)",
    show=show,
    saves=(
        "This is the table that every paper on efficient inference ends with: quality at a budget, "
        "on data that nobody has tuned on."
    ),
)


def main() -> None:
    """Measure the reference recipes."""
    for flags, *_ in REFERENCES:
        found = score(lambda flags=flags: flags, 0)
        print(f"{flags} {found.share:.3f} {found.loss:.4f} {found.points:.1f}", flush=True)


if __name__ == "__main__":
    main()
