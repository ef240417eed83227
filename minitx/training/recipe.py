"""A training recipe (``recipe.json``): the model, and the stages it is trained in.

Reading one checks every field, so that a spelling mistake is found before the first step and not
after an hour. Nothing is trained here.
"""

import json
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from minitx.checkpoints.common import read_json
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.skip.dota.detector import check_rank
from minitx.training.data import LINKS
from minitx.training.grades import KINDS, Grade, grade_from

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # as write_model calls them


@dataclass(frozen=True)
class EarlyExit:
    """LayerSkip's loss on the layers before the last: see layerskip.exit_weights."""

    scale: float
    rotation: int


@dataclass(frozen=True)
class Detecting:
    """DOTA's loss on scores that a detector of rank k estimates: see detector.joint_loss."""

    k: int
    weight: float = 0.01


@dataclass(frozen=True)
class Stage:
    """One part of the training: what is read, for how long, and how fast is learned."""

    name: str
    grades: dict  # name of a grade -> its share of the stories
    row: int  # tokens in a row
    batch: int  # rows in a step
    steps: int  # the most steps
    lr: float  # highest learning rate
    until: dict | None = None  # kind of answer -> accuracy; when all are reached the stage ends
    every: int = 100  # steps between checks on calibration stories
    check: int = 256  # calibration stories of one check
    warmup: int = 0  # steps in which the rate rises to lr
    schedule: str = "constant"  # or "cosine": the rate falls to final * lr
    final: float = 0.1
    chain: bool = True  # fill rows with further stories
    answer_weight: float = 1.0  # weight of an answer token in the loss; other tokens have 1
    weight_decay: float = 0.0
    clip: float = 1.0  # largest joint norm of all gradients; 0: any
    betas: tuple = (0.9, 0.95)
    muon: float | None = None  # lr of the blocks' matrices if Muon trains them, not AdamW
    layer_dropout: float = 0.0  # chance that a row passes by the last layer; less before it
    early_exit: EarlyExit | None = None
    # Teach the links of a chain of facts (where is the bell: "box", "Sam"), to be read in the place
    # of the answer after so many blocks. Two look-ups in a row are not found by chance.
    hops: tuple[int, ...] | None = None
    layers: int | None = None  # train this many of the first blocks, the others wait; None: all
    detector: Detecting | None = None  # train detectors of which keys matter beside the model


@dataclass(frozen=True)
class Recipe:
    name: str
    model: dict  # fields of Config; vocab_size, bos and eos follow from the tokenizer
    stages: tuple[Stage, ...]
    grades: dict = field(default_factory=dict)  # grades of its own: name -> fields of a Grade
    seed: int = 0
    dtype: str = "float16"  # of the finished file
    shards: int = 16  # parts that a batch is always worked on in, however many processes there are
    save_every: float = 120.0  # seconds between checkpoints

    @property
    def rank(self) -> int | None:
        """k of the detectors that are trained beside the model; None if none are."""
        return next((stage.detector.k for stage in self.stages if stage.detector), None)

    def shares(self, stage: Stage) -> list[tuple[Grade, float]]:
        """The stage's grades and their shares of the stories."""
        return [(grade_from(self.grades.get(g, g)), share) for g, share in stage.grades.items()]

    def config(self, vocab_size: int, end: int) -> Config:
        """The model's sizes, for a tokenizer with so many tokens, of which ``end`` ends a text."""
        given = {"vocab_size": vocab_size} | self.model
        if given["vocab_size"] < vocab_size:
            raise MinitxError(
                f"The recipe's model has vocab_size {given['vocab_size']} but its tokenizer has "
                f"{vocab_size} tokens; leave vocab_size out or make it at least that."
            )
        return Config(**given, bos=end, eos=(end,))

    def as_dict(self) -> dict:
        """The recipe as JSON would give it, every field spelled out."""
        return json.loads(json.dumps(asdict(self)))


def read_recipe(path) -> Recipe:
    """The recipe in a JSON file (or in the folder that holds a ``recipe.json``)."""
    path = Path(path)
    path = path / "recipe.json" if path.is_dir() else path
    try:
        return recipe_from(read_json(path))
    except MinitxError as error:
        message = str(error)
        raise MinitxError(
            message if message.startswith(str(path)) else f"{path}: {message}"
        ) from None


def recipe_from(given: dict) -> Recipe:
    """The recipe that a dict says; MinitxError in one sentence for whatever is wrong in it."""
    known = _checked(Recipe, given, "the recipe", RECIPE_RULES)
    stages = tuple(_stage(stage, f"stage {i + 1}") for i, stage in enumerate(known["stages"]))
    recipe = Recipe(**known | {"stages": stages})
    names = [f.name for f in fields(Config)]
    for name in recipe.model:
        if name not in names or name in ("bos", "eos"):
            raise MinitxError(f"Unknown field {name!r} in the recipe's model{_hint(name, names)}.")
    try:
        config = Config(**{"vocab_size": 1} | recipe.model)
    except TypeError as error:
        raise MinitxError(f"The recipe's model is incomplete: {error}.") from None
    for stage in stages:
        _need_reachable(stage, recipe.shares(stage))
        if stage.batch % recipe.shards:
            raise MinitxError(
                f"Stage {stage.name!r} has batches of {stage.batch} rows, which do not cut into "
                f"{recipe.shards} equal shards; make batch a multiple of shards."
            )
        if stage.row > config.context:
            raise MinitxError(
                f"Stage {stage.name!r} has rows of {stage.row} tokens but the model's context is "
                f"{config.context}; use shorter rows or a longer context."
            )
        if stage.layers is not None and stage.layers > config.layers:
            raise MinitxError(
                f"Stage {stage.name!r} trains the first {stage.layers} layers but the model has "
                f"{config.layers}; use fewer, or leave layers out for all."
            )
        if config.skipless and (stage.layers not in (None, config.layers) or stage.layer_dropout):
            raise MinitxError(
                f"Stage {stage.name!r} leaves blocks out (layers, layer_dropout), but a skipless "
                "model has no stream that passes them by; train all blocks."
            )
        blocks = stage.layers or config.layers
        if stage.hops and (len(stage.hops) > LINKS or max(stage.hops) > blocks):
            raise MinitxError(
                f"Stage {stage.name!r} has hops {list(stage.hops)} but trains {blocks} blocks; "
                f"give at most {LINKS} numbers, up to that."
            )
        if stage.detector is not None:
            check_rank(stage.detector.k, config, f"The detector of stage {stage.name!r}: k")
            if stage.detector.k != recipe.rank:
                raise MinitxError(
                    f"Stage {stage.name!r} has a detector with k={stage.detector.k} after one with "
                    f"k={recipe.rank}; the same detector is trained on, so use one k."
                )
    return recipe


def _stage(given, where: str) -> Stage:
    known = _checked(Stage, given, where, STAGE_RULES)
    if known.get("early_exit") is not None:
        inner = _checked(EarlyExit, known["early_exit"], f"early_exit of {where}", EXIT_RULES)
        known["early_exit"] = EarlyExit(**inner)
    if known.get("detector") is not None:
        where = f"detector of {where}"
        known["detector"] = Detecting(
            **_checked(Detecting, known["detector"], where, DETECTOR_RULES)
        )
    if known.get("hops") is not None:
        known["hops"] = tuple(known["hops"])
    if "betas" in known:
        known["betas"] = tuple(known["betas"])
    for kind in known.get("until") or {}:
        if kind not in KINDS:
            raise MinitxError(
                f"Unknown kind of answer {kind!r} in until of {where}{_hint(kind, KINDS)}."
            )
    return Stage(**known)


def _need_reachable(stage: Stage, shares: list[tuple[Grade, float]]) -> None:
    """Refuse to wait for the accuracy of an answer that no story of the stage holds."""
    asked = set()
    for grade, _ in shares:
        told = {kind for kind, weight in grade.sentences.items() if weight}
        asked |= {kind for kind, weight in grade.questions.items() if weight}
        asked |= {"mention"} if grade.recap or told & {"mention", "leave", "fetch"} else set()
    for kind in stage.until or {}:
        if kind not in asked:
            raise MinitxError(
                f"Stage {stage.name!r} waits until {kind!r} is learned but its grades never ask "
                f"that; they have {', '.join(sorted(asked)) or 'no answers'}."
            )


# Checks of single fields -------------------------------------------------------------------------

Rule = tuple[Callable[[Any], bool], str]  # is the value good, and what is needed in words


def _number(value) -> bool:
    return type(value) in (int, float)


def _shares(value, low: float, high: float) -> bool:
    good = isinstance(value, dict) and value
    return bool(good) and all(_number(v) and low < v <= high for v in value.values())


TEXT: Rule = (lambda v: isinstance(v, str) and bool(v), "a text")
FLAG: Rule = (lambda v: type(v) is bool, "true or false")
WHOLE: Rule = (lambda v: type(v) is int and v >= 0, "an integer >= 0")
POSITIVE: Rule = (lambda v: type(v) is int and v >= 1, "an integer >= 1")
ABOVE_0: Rule = (lambda v: _number(v) and 0 < v < 1e9, "a number above 0")
FROM_0: Rule = (lambda v: _number(v) and 0 <= v < 1e9, "a number >= 0")
SHARE: Rule = (lambda v: _number(v) and 0 <= v <= 1, "a number from 0 to 1")

RECIPE_RULES = {
    "name": TEXT,
    "model": (lambda v: isinstance(v, dict), "an object with the fields of the configuration"),
    "stages": (lambda v: isinstance(v, list) and bool(v), "a list of at least one stage"),
    "grades": (lambda v: isinstance(v, dict), "an object of name: grade"),
    "seed": WHOLE,
    "dtype": (lambda v: isinstance(v, str) and v in DTYPES, f"one of {', '.join(DTYPES)}"),
    "shards": POSITIVE,
    "save_every": ABOVE_0,
}
STAGE_RULES = {
    "name": TEXT,
    "grades": (lambda v: _shares(v, 0, 1e9), "an object of grade: share above 0"),
    "row": POSITIVE,
    "batch": POSITIVE,
    "steps": POSITIVE,
    "lr": ABOVE_0,
    "until": (lambda v: v is None or _shares(v, 0, 1), "an object of kind: accuracy up to 1"),
    "every": POSITIVE,
    "check": POSITIVE,
    "warmup": WHOLE,
    "schedule": (lambda v: v in ("constant", "cosine"), '"constant" or "cosine"'),
    "final": SHARE,
    "chain": FLAG,
    "answer_weight": ABOVE_0,
    "weight_decay": FROM_0,
    "clip": FROM_0,
    "muon": (lambda v: v is None or _number(v) and 0 < v < 1e9, "a number above 0"),
    "betas": (
        lambda v: isinstance(v, list) and len(v) == 2 and all(_number(b) and 0 <= b < 1 for b in v),
        "a list of two numbers from 0 to below 1",
    ),
    "layer_dropout": (lambda v: _number(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "hops": (
        lambda v: v is None or isinstance(v, list | tuple) and v and all(map(POSITIVE[0], v)),
        "a list of integers of blocks",
    ),
    "early_exit": (
        lambda v: v is None or isinstance(v, dict),
        "an object with scale and rotation",
    ),
    "layers": (lambda v: v is None or type(v) is int and v >= 1, "an integer >= 1"),
    "detector": (lambda v: v is None or isinstance(v, dict), "an object with k and weight"),
}
EXIT_RULES = {"scale": FROM_0, "rotation": POSITIVE}
DETECTOR_RULES = {"k": POSITIVE, "weight": FROM_0}


def _checked(cls, given, where: str, rules: dict[str, Rule]) -> dict:
    """The fields of ``given`` as a new dict, after each was found known, present and good."""
    if not isinstance(given, dict):
        raise MinitxError(f"{_begin(where)} is {given!r}; it must be an object of fields.")
    for name, value in given.items():
        if name not in rules:
            raise MinitxError(f"Unknown field {name!r} in {where}{_hint(name, rules)}.")
        good, needed = rules[name]
        if not good(value):
            raise MinitxError(f"Field {name!r} of {where} is {value!r}; it must be {needed}.")
    for f in fields(cls):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in given:
            raise MinitxError(f"{_begin(where)} has no field {f.name!r}, which is needed.")
    return dict(given)


def _begin(text: str) -> str:
    return text[0].upper() + text[1:]


def _hint(name: str, known) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
