"""A training recipe (``recipe.json``): the model, and the stages in which it is trained.

Every field is validated when a recipe is read, so that a typo is found before the first step and
not after an hour. Nothing is trained here.
"""

import json
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from minitx.checkpoints.common import need_small_rope_tables, read_json
from minitx.checkpoints.hf_config_write import config_fields
from minitx.config import Config
from minitx.errors import MinitxError, abbreviate, did_you_mean
from minitx.skip.dota.detector import check_rank
from minitx.training.data import MAX_BRIDGES, story_tokenizer
from minitx.training.stories.grades import KINDS, Grade, grade_from

MAX_NUMBERS = 2**32  # in memory while training: 16 GiB of float32
ROUTED = "mixture_of_depths"
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # as write_model calls them


@dataclass(frozen=True)
class EarlyExitLoss:
    """LayerSkip's early exit loss: see layerskip.exit_weights."""

    scale: float
    rotation: int


@dataclass(frozen=True)
class DetectorLoss:
    """DOTA's loss of a detector of rank k, trained with the model: see detector.joint_loss."""

    k: int
    weight: float = 0.01


@dataclass(frozen=True)
class RouterLoss:
    """The loss of Mixture-of-Depths' routers, trained with the model: see
    mixture_of_depths.routed_loss."""

    capacity: float  # share of a row's tokens that enter each routed block
    weight: float = 0.1


@dataclass(frozen=True)
class Teacher:
    """A larger model whose distributions this one learns, on text that it writes: see
    distillation."""

    model: str  # a shipped model's name, or a folder
    temperatures: tuple[float, ...] = (1.0,)
    weights: tuple[float, ...] = (1.0,)  # of the loss at each temperature
    rows: int = 2048  # rows of text, written when the stage begins
    prompt: tuple[int, int] = (4, 120)  # shortest and longest prompt of a row, in tokens


@dataclass(frozen=True)
class Stage:
    """One part of the training: its data, its length, and the optimizer's settings."""

    name: str
    grades: dict  # name of a grade -> its share of the stories
    row: int  # tokens per row
    batch: int  # rows per step
    steps: int  # maximum number of steps
    lr: float  # peak learning rate
    until: dict | None = (
        None  # kind of answer -> target accuracy; the stage ends when all are reached
    )
    every: int = 100  # steps between checks on calibration stories
    check: int = 256  # number of calibration stories per check
    warmup: int = 0  # steps of linear warmup to lr
    schedule: str = "constant"  # or "cosine": decay to final * lr
    final: float = 0.1
    chain: bool = True  # fill rows with further stories
    answer_weight: float = 1.0  # loss weight of an answer token; others have 1
    weight_decay: float = 0.0
    clip: float = 1.0  # maximum global gradient norm; 0: no clipping
    betas: tuple = (0.9, 0.95)
    muon: float | None = None  # lr of Muon for the matrices in blocks; None: AdamW trains all
    layer_dropout: float = (
        0.0  # probability of skipping the last layer, per row; less for earlier layers
    )
    early_exit: EarlyExitLoss | None = None
    # Supervise the bridge entities of multi-hop answers (where is the bell: "box", "Sam"): the
    # logits after hops[i] blocks, at the answer's position, should predict bridge entity i. Without
    # this, the model does not find out by itself to chain two look-ups.
    hops: tuple[int, ...] | None = None
    layers: int | None = None  # train only this many blocks, from the first; None: all
    detector: DetectorLoss | None = None  # train DOTA's detectors with the model
    router: RouterLoss | None = None  # train the routers of mixture_of_depths with the model
    teacher: Teacher | None = None  # learn from a larger model instead of from stories

    @property
    def beside(self) -> str | None:
        """What is trained beside the model with a loss of its own: "detector", "router" or None."""
        return next((name for name in ("detector", "router") if getattr(self, name)), None)


@dataclass(frozen=True)
class Recipe:
    """Either ``model``, which is trained from random weights, or ``start``."""

    name: str
    stages: tuple[Stage, ...]
    model: dict = field(default_factory=dict)  # fields of Config; the tokenizer gives the others
    start: str | None = None  # a model to train further: a shipped model's name, or a folder
    techniques: dict = field(default_factory=dict)  # that are applied to it first: {name: options}
    grades: dict = field(default_factory=dict)  # custom grades: name -> fields of a Grade
    seed: int = 0
    dtype: str = "float16"  # of the saved weights; with techniques they are saved as float32
    shards: int = 16  # parts of a batch, independent of the number of processes
    save_every: float = 120.0  # seconds between checkpoints

    @property
    def capacity(self) -> float | None:
        """The capacity with which the routers of mixture_of_depths are trained at last; None
        without routers."""
        router = self.stages[-1].router
        return None if router is None else router.capacity

    @property
    def rank(self) -> int | None:
        """Rank k of the detectors that are trained with the model; None without detectors."""
        return next((stage.detector.k for stage in self.stages if stage.detector), None)

    def shares(self, stage: Stage) -> list[tuple[Grade, float]]:
        """The stage's grades and their shares of the stories."""
        return [(grade_from(self.grades.get(g, g)), share) for g, share in stage.grades.items()]

    def config(self, vocab_size: int, end: int) -> Config:
        """The model's configuration, for a tokenizer of this size whose end-of-text id is
        ``end``."""
        given = {"vocab_size": vocab_size} | self.model
        if given["vocab_size"] < vocab_size:
            raise MinitxError(
                f"The model's vocab_size must be at least {vocab_size}, the size of the tokenizer; "
                f"got {given['vocab_size']}. Leave it out or increase it."
            )
        return Config(**given, bos=end, eos=(end,))

    def as_dict(self) -> dict:
        """The recipe as plain JSON data, with all defaults filled in."""
        return json.loads(json.dumps(asdict(self)))


def read_recipe(path) -> Recipe:
    """Read a recipe from a JSON file, or from a folder with a ``recipe.json``."""
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
    """The recipe given as a dict; MinitxError for the first invalid field."""
    known = _checked(Recipe, given, "the recipe", RECIPE_RULES)
    stages = tuple(_stage(stage, f"stage {i + 1}") for i, stage in enumerate(known["stages"]))
    recipe = Recipe(**known | {"stages": stages, "techniques": _by_name(known)})
    config = _config_of(recipe) if recipe.start is None else _config_of_start(recipe)
    for stage in stages:
        _check_reachable(stage, recipe.shares(stage))
        if stage.batch % recipe.shards:
            raise MinitxError(
                f"Stage {stage.name!r}: batch must be a multiple of shards ({recipe.shards}); "
                f"got {stage.batch}."
            )
        if stage.row > config.context:
            raise MinitxError(
                f"Stage {stage.name!r}: row must be at most the model's context, which is "
                f"{config.context}; got {stage.row}. Use shorter rows or a longer context."
            )
        if stage.layers is not None and stage.layers > config.layers:
            raise MinitxError(
                f"Stage {stage.name!r}: layers must be at most {config.layers}, as the model has; "
                f"got {stage.layers}. Omit it to train all."
            )
        if config.skipless and (stage.layers not in (None, config.layers) or stage.layer_dropout):
            raise MinitxError(
                f"Stage {stage.name!r} skips blocks (layers, layer_dropout), but a skipless "
                "model has no residual stream around them; train all blocks."
            )
        blocks = stage.layers or config.layers
        if stage.hops and (len(stage.hops) > MAX_BRIDGES or max(stage.hops) > blocks):
            raise MinitxError(
                f"Stage {stage.name!r}: hops must be at most {MAX_BRIDGES} integers, each at most "
                f"{blocks} (the blocks it trains); got {list(stage.hops)}."
            )
        if (stage.router is not None) != (ROUTED in recipe.techniques):
            has = "has no router" if stage.router is None else "has a router"
            raise MinitxError(
                f"Stage {stage.name!r} {has}; give a router in every stage of a recipe whose "
                f"techniques have {ROUTED}, and in no other."
            )
        router = recipe.techniques.get(ROUTED, {}).get("router", "auto")
        if stage.router is not None and router != "fitted":
            raise MinitxError(
                f"Stage {stage.name!r} trains routers, which starts from fitted ones: the recipe's "
                f"{ROUTED} must have the router 'fitted', got {abbreviate(router)}."
            )
        if stage.teacher is not None:
            tokenizer = story_tokenizer()
            size = recipe.model.get("vocab_size", len(tokenizer))
            size = config.vocab_size if recipe.start is not None else size
            _check_teacher(stage, size, tokenizer)
        if stage.detector is not None:
            check_rank(stage.detector.k, config, f"The detector of stage {stage.name!r}: k")
            if stage.detector.k != recipe.rank:
                raise MinitxError(
                    f"Stage {stage.name!r}: expected a detector with k={recipe.rank}, as "
                    f"in the stage before, got k={stage.detector.k}; it is trained further."
                )
    if recipe.start is not None:
        _check_trainable(recipe)
    return recipe


def _by_name(known: dict) -> dict:
    """The recipe's techniques with underscores in their names, as everywhere in Python."""
    found: dict = {}
    for name, options in known.get("techniques", {}).items():
        if (name := name.replace("-", "_")) in found:
            raise MinitxError(
                f"The recipe's techniques have {abbreviate(name)} twice; give it once."
            )
        found[name] = options
    return found


def _config_of(recipe: Recipe) -> Config:
    """The configuration of the model that is trained from random weights."""
    if not recipe.model:
        raise MinitxError(
            "The recipe must have the field 'model', the sizes of a model to train from random "
            "weights, or 'start', a model to train further; add one."
        )
    if recipe.techniques:
        raise MinitxError(
            "The recipe has techniques but no model to start from; add 'start', or train first and "
            "apply them afterwards."
        )
    names = [f.name for f in fields(Config) if f.name not in ("bos", "eos")]
    for name in recipe.model:
        if name not in names:
            raise MinitxError(
                f"Unknown field {abbreviate(name)} in the recipe's model; "
                f"{did_you_mean(name, names)}"
            )
    try:
        config = Config(**{"vocab_size": 1} | recipe.model)
    except TypeError as error:
        raise MinitxError(f"The recipe's model is incomplete: {error}.") from None
    _check_representable(config, recipe)
    return config


def _config_of_start(recipe: Recipe) -> Config:
    """The configuration of the model that is trained further, after its techniques."""
    from minitx.training.start import starting_model  # which needs ``Recipe``

    if recipe.model:
        raise MinitxError(
            "The recipe has 'model', to train from random weights, and 'start', to train further; "
            "give one of them."
        )
    for stage in recipe.stages:
        for name in ("layers", "detector"):
            if getattr(stage, name) is not None:
                raise MinitxError(
                    f"Stage {stage.name!r}: {name} is for training from random weights, and this "
                    f"recipe starts from {abbreviate(recipe.start)}; leave it out."
                )
    return starting_model(recipe, story_tokenizer()).model.config


def _check_trainable(recipe: Recipe) -> None:
    """Refuse techniques through which the loss cannot be differentiated, before the first step."""
    from minitx.training.layerskip import record
    from minitx.training.start import need_gradients, starting_model  # which need ``Recipe``

    lm = starting_model(recipe, story_tokenizer())
    if any(stage.early_exit or stage.hops for stage in recipe.stages):
        record(lm.model)  # refuses blocks that do not run one after another
    if recipe.capacity is None:  # routers have a form of their own for the training
        need_gradients(recipe, lm)


def _stage(given, where: str) -> Stage:
    known = _checked(Stage, given, where, STAGE_RULES)
    if known.get("early_exit") is not None:
        inner = _checked(EarlyExitLoss, known["early_exit"], f"early_exit of {where}", EXIT_RULES)
        known["early_exit"] = EarlyExitLoss(**inner)
    if known.get("detector") is not None:
        where = f"detector of {where}"
        known["detector"] = DetectorLoss(
            **_checked(DetectorLoss, known["detector"], where, DETECTOR_RULES)
        )
    if known.get("router") is not None:
        where = f"router of {where}"
        known["router"] = RouterLoss(**_checked(RouterLoss, known["router"], where, ROUTER_RULES))
    if known.get("teacher") is not None:
        known["teacher"] = _teacher(known["teacher"], f"teacher of {where}")
    if known.get("hops") is not None:
        known["hops"] = tuple(known["hops"])
    if "betas" in known:
        known["betas"] = tuple(known["betas"])
    for kind in known.get("until") or {}:
        if kind not in KINDS:
            raise MinitxError(
                f"Unknown kind of answer {abbreviate(kind)} in until of {where}; "
                f"{did_you_mean(kind, KINDS)}"
            )
    return Stage(**known)


def _teacher(given, where: str) -> Teacher:
    known = _checked(Teacher, given, where, TEACHER_RULES)
    known |= {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
    teacher = Teacher(**known)
    if len(teacher.weights) != len(teacher.temperatures):
        raise MinitxError(
            f"The {where} must have as many weights as temperatures "
            f"({len(teacher.temperatures)}), got {len(teacher.weights)}."
        )
    if teacher.prompt[0] > teacher.prompt[1]:
        raise MinitxError(
            f"The {where} must have a prompt of [shortest, longest], got {list(teacher.prompt)}."
        )
    return teacher


def _check_teacher(stage: Stage, vocab_size: int, tokenizer) -> None:
    """Refuse a teacher that cannot teach this model, and fields of a stage that need stories."""
    from minitx.training.distillation import load_teacher

    where = f"Stage {stage.name!r}"
    defaults = {f.name: f.default for f in fields(Stage)} | {"chain": False}
    for name in STORIES_ONLY:
        if getattr(stage, name) != defaults[name]:
            raise MinitxError(
                f"{where} has a teacher, whose rows are single texts without known answers: "
                f"{name} must be {json.dumps(defaults[name])}, got "
                f"{abbreviate(getattr(stage, name))}."
            )
    if stage.teacher.prompt[1] > stage.row:
        raise MinitxError(
            f"{where}: the longest prompt of its teacher must be at most the row ({stage.row}), "
            f"got {stage.teacher.prompt[1]}."
        )
    load_teacher(stage, tokenizer, vocab_size)


def _check_representable(config: Config, recipe: Recipe) -> None:
    """Refuse a model that cannot be written at the end, or that does not fit into memory."""
    config_fields(config)
    need_small_rope_tables("The recipe's model", config)
    c = config
    block = c.width * c.head_width * (2 * c.heads + 2 * c.kv_heads) + 3 * c.width * c.hidden
    weights = c.layers * block + (c.context + 2 * c.vocab_size) * c.width
    if c.layers > 1000 or weights * (recipe.shards + 3) > MAX_NUMBERS:
        raise MinitxError(
            f"The recipe's model has {c.layers} layers and about {weights:.3g} weights; training "
            f"in {recipe.shards} shards keeps {recipe.shards + 3} numbers for each of them, and at "
            f"most {MAX_NUMBERS:.3g} in all."
        )


def _check_reachable(stage: Stage, shares: list[tuple[Grade, float]]) -> None:
    """Refuse a target accuracy for a kind of answer that no story of the stage contains."""
    asked = set()
    for grade, _ in shares:
        sentences = {kind for kind, weight in grade.sentences.items() if weight}
        asked |= {kind for kind, weight in grade.questions.items() if weight}
        asked |= {"mention"} if grade.recap or sentences & {"mention", "leave", "fetch"} else set()
    for kind in stage.until or {}:
        if kind not in asked:
            raise MinitxError(
                f"Stage {stage.name!r}: until has {kind!r}, which its grades never ask; they have "
                f"{', '.join(sorted(asked)) or 'no answers'}."
            )


# Validation of single fields ---------------------------------------------------------------------

Rule = tuple[Callable[[Any], bool], str]  # is the value valid, and what is expected, in words


def _number(value) -> bool:
    return type(value) in (int, float)


def _numbers_by_name(value, low: float, high: float) -> bool:
    nonempty = isinstance(value, dict) and value
    return bool(nonempty) and all(_number(v) and low < v <= high for v in value.values())


def _numbers(value, low: float) -> bool:
    return isinstance(value, list | tuple) and all(_number(v) and low <= v <= 1000 for v in value)


def _integer(low: int, high: int = 10**9) -> Rule:
    return (lambda v: type(v) is int and low <= v <= high, f"an integer >= {low} (at most {high})")


TEXT: Rule = (
    lambda v: isinstance(v, str) and v.isprintable() and 0 < len(v) <= 100,
    "a printable string of 1 to 100 characters",
)
FLAG: Rule = (lambda v: type(v) is bool, "true or false")
NON_NEGATIVE, POSITIVE = _integer(0), _integer(1)
ABOVE_0: Rule = (lambda v: _number(v) and 0 < v < 1e9, "a number above 0")
AT_LEAST_0: Rule = (lambda v: _number(v) and 0 <= v < 1e9, "a number >= 0")
FRACTION: Rule = (lambda v: _number(v) and 0 <= v <= 1, "a number from 0 to 1")

RECIPE_RULES = {
    "name": TEXT,
    "model": (
        lambda v: isinstance(v, dict),
        "an object with the fields of a model's configuration",
    ),
    "start": (
        lambda v: v is None or isinstance(v, str) and v.isprintable() and 0 < len(v) <= 1000,
        "the name or the folder of a model",
    ),
    "techniques": (
        lambda v: isinstance(v, dict) and all(isinstance(o, dict) for o in v.values()),
        "an object of technique: {option: value}",
    ),
    "stages": (lambda v: isinstance(v, list) and bool(v), "a list of at least one stage"),
    "grades": (lambda v: isinstance(v, dict), "an object of name: grade"),
    "seed": _integer(0, 2**64 - 1),
    "dtype": (lambda v: isinstance(v, str) and v in DTYPES, f"one of {', '.join(DTYPES)}"),
    "shards": _integer(1, 1024),
    "save_every": ABOVE_0,
}
STAGE_RULES = {
    "name": TEXT,
    "grades": (lambda v: _numbers_by_name(v, 0, 1e9), "an object of grade: share above 0"),
    "row": _integer(1, 10**6),
    "batch": _integer(1, 10**5),
    "steps": POSITIVE,
    "lr": ABOVE_0,
    "until": (
        lambda v: v is None or _numbers_by_name(v, 0, 1),
        "an object {kind: accuracy up to 1}",
    ),
    "every": POSITIVE,
    "check": _integer(1, 10**5),
    "warmup": NON_NEGATIVE,
    "schedule": (lambda v: v in ("constant", "cosine"), '"constant" or "cosine"'),
    "final": FRACTION,
    "chain": FLAG,
    "answer_weight": ABOVE_0,
    "weight_decay": AT_LEAST_0,
    "clip": AT_LEAST_0,
    "muon": (lambda v: v is None or _number(v) and 0 < v < 1e9, "a number above 0"),
    "betas": (
        lambda v: isinstance(v, list) and len(v) == 2 and all(_number(b) and 0 <= b < 1 for b in v),
        "a list of two numbers from 0 to below 1",
    ),
    "layer_dropout": (lambda v: _number(v) and 0 <= v < 1, "a number from 0 to below 1"),
    "hops": (
        lambda v: v is None or isinstance(v, list | tuple) and v and all(map(POSITIVE[0], v)),
        "a list of integers >= 1, numbers of blocks",
    ),
    "early_exit": (
        lambda v: v is None or isinstance(v, dict),
        "an object with scale and rotation",
    ),
    "layers": (lambda v: v is None or POSITIVE[0](v), "an integer >= 1"),
    "detector": (lambda v: v is None or isinstance(v, dict), "an object with k and weight"),
    "router": (lambda v: v is None or isinstance(v, dict), "an object with capacity and weight"),
    "teacher": (
        lambda v: v is None or isinstance(v, dict),
        "an object with model, temperatures, weights, rows and prompt",
    ),
}
EXIT_RULES = {"scale": AT_LEAST_0, "rotation": POSITIVE}
DETECTOR_RULES = {"k": POSITIVE, "weight": AT_LEAST_0}
# Fields of a stage that need the answers of stories, several stories in a row, or hidden states.
STORIES_ONLY = ("chain", "answer_weight", "layer_dropout", "early_exit", "hops", "layers")
STORIES_ONLY += ("detector", "router")
TEACHER_RULES = {
    "model": (
        lambda v: isinstance(v, str) and v.isprintable() and 0 < len(v) <= 1000,
        "the name or the folder of a model",
    ),
    "temperatures": (
        lambda v: _numbers(v, 1e-3) and len(v) > 0,
        "a list of at least one temperature, each from 0.001 to 1000",
    ),
    "weights": (
        lambda v: _numbers(v, 0) and any(v),
        "a list of numbers from 0 to 1000, at least one above 0",
    ),
    "rows": _integer(1, 2**16),
    "prompt": (
        lambda v: isinstance(v, list | tuple) and len(v) == 2 and all(map(POSITIVE[0], v)),
        "a list of two integers >= 1, the shortest and the longest",
    ),
}
ROUTER_RULES = {
    "capacity": (lambda v: _number(v) and 0 < v <= 1, "a number above 0, at most 1"),
    "weight": AT_LEAST_0,
}


def _checked(cls, given, where: str, rules: dict[str, Rule]) -> dict:
    """Validate the fields of ``given``; returns them as a new dict."""
    if not isinstance(given, dict):
        raise MinitxError(
            f"{_capitalized(where)} must be an object of fields, got {abbreviate(given)}."
        )
    for name, value in given.items():
        if name not in rules:
            raise MinitxError(
                f"Unknown field {abbreviate(name)} in {where}; {did_you_mean(name, rules)}"
            )
        is_valid, expected = rules[name]
        if not is_valid(value):
            raise MinitxError(
                f"Field {name!r} of {where} must be {expected}, got {abbreviate(value)}."
            )
    for f in fields(cls):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in given:
            raise MinitxError(f"{_capitalized(where)} must have the field {f.name!r}; add it.")
    return dict(given)


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]
