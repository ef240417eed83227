"""Techniques: how to declare one, how its options are read, and how it is applied to a model.

A technique is a function ``f(lm, *, option: type = default, ...) -> lm`` that returns a changed
copy of the model. Its docstring is its card. It has its own file (or folder) in ``skip/`` or
``precompute/``, and that is all it takes to be found: as a flag (``--ffn-skip threshold=0.95``), in
``minitx.load(NAME, ffn_skip={...})``, in ``minitx list``, and by the tests that every technique
must pass.

There are three ways to address the parts that it changes:

- ``swap(lm, Linear, make)``: every part of this type, wherever it is inside the model;
- ``wrap(lm, "ffn", make)``: whatever occupies this slot of every block, including what other
  techniques have already wrapped around it;
- ``dataclasses.replace``: one particular place.
"""

import importlib
import inspect
import itertools
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np

from minitx.calibration import recording, source_of
from minitx.errors import MinitxError, MinitxWarning, abbreviate, nearest
from minitx.lm import LM
from minitx.memory_layout import to_column_major, to_row_major
from minitx.model import FFN, Attention, Block, Stack
from minitx.tree import Part, rebuild, walk
from minitx.values import ANY_NUMBER, Range, as_number

# A technique's file imports what it declares its options with from here.
from minitx.values import SEEDS as SEEDS
from minitx.values import above as above
from minitx.values import at_least as at_least
from minitx.values import between as between

# Techniques are applied from the inside out, whatever the order of the flags: one of an inner level
# before one of an outer level. So the first-layer table is made from weights that are already
# folded, and a feed-forward network that is skipped may itself be a table lookup. "pruning" removes
# weights, "weights" rewrites the remaining matrices, "matrices" changes how each is stored and
# multiplied, "scores" selects which keys are scored; "decode" replaces or wraps the decoding loop,
# and "answer" decides about a whole completion: who writes it, or whether it is known already.
# Within a level, ``after`` names the techniques that come first.
LEVELS = (
    "pruning", "weights", "matrices",
    "scores", "attention", "ffn", "block", "stack", "head", "decode", "answer",
)  # fmt: skip
PACKAGES = ("minitx.precompute", "minitx.skip")


@dataclass(frozen=True)
class Option:
    """One option of a technique, from its signature:
    ``name: Annotated[int, "what it means", at_least(1)] = 4``. A number without a range is between
    -2**40 and 2**40."""

    name: str
    type: Any  # int, float, bool, str, or Literal[...]; "| None" where None is allowed
    default: Any
    meaning: str = ""
    range: Range | None = None

    @classmethod
    def of(cls, p: inspect.Parameter) -> "Option":
        if get_origin(p.annotation) is not Annotated:
            return cls(p.name, p.annotation, p.default)
        kind, *notes = get_args(p.annotation)
        meaning = next((note for note in notes if isinstance(note, str)), "")
        found = next((note for note in notes if isinstance(note, Range)), None)
        return cls(p.name, kind, p.default, meaning, found)

    def read(self, text: str) -> Any:
        """Parse the value from the command line; ValueError if it cannot be parsed."""
        if text == "None" and type(None) in get_args(self.type):
            return None
        kind = self._kind()
        if kind is not bool:
            return kind(text)
        if text.lower() not in ("true", "false"):
            raise ValueError
        return text.lower() == "true"

    def check(self, value: Any) -> Any:
        """The value, converted (NumPy's numbers, booleans and strings to Python's, integers to
        float if a float is expected); ValueError if it has the wrong type or is out of range."""
        if value is None and type(None) in get_args(self.type):
            return value
        kind = self._kind()
        if isinstance(value, np.bool_ | np.str_):
            value = value.item()
        if kind in (int, float):
            value = as_number(value, kind)
        if type(value) is not kind or self.choices() and value not in self.choices():
            raise ValueError
        if kind in (int, float) and value not in (self.range or ANY_NUMBER):
            raise ValueError
        return value

    def expected(self, given: Any = None) -> str:
        """The values that are allowed, in words: "an integer, at least 1". An implied upper limit
        is mentioned only where the value given exceeds it."""
        words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
        found = words[self._kind()]
        if choices := self.choices():
            found = f"one of {', '.join(map(str, choices))}"
        elif isinstance(given, int | float) and given > (self.range or ANY_NUMBER).high:
            found = f"{found}, {(self.range or ANY_NUMBER).in_words()}"
        elif self.range is not None:
            found = f"{found}, {self.range}"
        if type(None) in get_args(self.type):
            found += ", or None" if "," in found else " or None"
        return found

    def choices(self) -> tuple:
        return get_args(self._type()) if get_origin(self._type()) is Literal else ()

    def _type(self):
        """The type without ``| None``."""
        if type(None) in get_args(self.type):
            return next(t for t in get_args(self.type) if t is not type(None))
        return self.type

    def _kind(self) -> type:
        choices = self.choices()
        return type(choices[0]) if choices else self._type()


@dataclass(frozen=True)
class Technique:
    """A registered technique: its function and what it declares."""

    name: str
    level: str
    exact: bool
    neutral: dict | None  # options with which it equals the dense model; None if there are none
    function: Callable
    after: tuple[str, ...] = ()  # techniques of the same level that are applied first
    demo: dict = field(default_factory=dict)  # options with which it acts on the tiny test models
    event: str | tuple[str, str] | None = None  # the event that it counts when it acts
    presets: dict[str, dict] = field(default_factory=dict)  # named settings: preset=NAME

    def acted(self, events: dict[str, int]) -> bool:
        """Do the counted events show that it acted?"""
        if isinstance(self.event, tuple):
            some, all_of_them = self.event
            return 0 < events[some] < events[all_of_them]
        return events[self.event] > 0

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @cached_property
    def options(self) -> dict[str, Option]:
        parameters = list(inspect.signature(self.function).parameters.values())[1:]
        return {p.name: Option.of(p) for p in parameters}

    @property
    def path(self) -> str:
        """Its file, from the top of the repository: ``minitx/skip/elsa/__init__.py``."""
        path = self.function.__module__.replace(".", "/")
        is_folder = hasattr(sys.modules[self.function.__module__], "__path__")
        return f"{path}/__init__.py" if is_folder else f"{path}.py"

    @property
    def card(self) -> "Card":
        return read_card(self.function.__doc__ or "")

    def checked(self, given: dict) -> dict:
        """The options, checked and converted, those of ``preset=NAME`` in its place; MinitxError
        for an unknown name or a bad value."""
        options = self.options
        found = {}
        for name, value in self.with_preset(given).items():
            if name not in options:
                names = [PRESET, *options] if self.presets else options
                known = f"choose from {', '.join(names)}." if names else "it takes none."
                if near := nearest(name, names):
                    known += f" Did you mean {near!r}?"
                raise MinitxError(f"{self.name} has no option {abbreviate(name)}; {known}")
            try:
                found[name] = options[name].check(value)
            except ValueError:
                raise self.bad_value(name, value) from None
        return found

    def bad_value(self, name: str, value) -> MinitxError:
        expected = self.options[name].expected(given=value)
        return MinitxError(f"{self.name}: {name} must be {expected}; got {abbreviate(value)}.")

    def with_preset(self, given: dict) -> dict:
        """The options with those of the preset that they name, which the others override."""
        if PRESET not in given or not self.presets:
            return given  # ``checked`` refuses a preset by name if there are none
        known, name = {"default": {}} | self.presets, given[PRESET]
        if not isinstance(name, str) or name not in known:
            near = nearest(name, known) if isinstance(name, str) else None
            hint = f" (did you mean {near!r}?)" if near else ""
            raise MinitxError(
                f"{self.name}: {PRESET} must be one of {', '.join(known)}{hint}; got "
                f"{abbreviate(name)}."
            )
        return known[name] | {option: x for option, x in given.items() if option != PRESET}

    def read(self, words: Iterable[str]) -> dict:
        """Parse options like ``threshold=0.95``, and check them."""
        return self.checked(self.parse(words))

    def parse(self, words: Iterable[str]) -> dict:
        """Parse options like ``threshold=0.95``; a preset stays a name."""
        found = {}
        for word in words:
            name, equals, text = word.partition("=")
            name = name.replace("-", "_")
            if name not in self.options:
                found[name] = text  # a preset; ``checked`` refuses others by name
                continue
            if not equals:
                raise MinitxError(f"{self.name}: expected {name}=VALUE, got {abbreviate(word)}.")
            try:
                found[name] = self.options[name].read(text)
            except ValueError:
                raise self.bad_value(name, text) from None
        return found


def as_words(options: dict) -> str:
    """Options as ``Technique.read`` parses them: ``threshold=0.95 window=2``."""
    return " ".join(f"{name}={value}" for name, value in options.items())


PRESET = "preset"  # stands beside the options: --early-exit preset=paper
REGISTRY: dict[str, Technique] = {}


def technique(
    *,
    level: str,
    exact: bool,
    neutral: dict | None,
    after: tuple[str, ...] = (),
    demo: dict | None = None,
    event: str | tuple[str, str] | None = None,
    presets: dict[str, dict] | None = None,
):
    """Decorator that registers a function as a technique. Its file or folder has the same name.

    level: one of ``LEVELS``. exact: is the result the same except for rounding? neutral: options
    with which it computes exactly what the dense model computes; None for an exact technique
    without such options. after: techniques of the same level that are applied first.

    demo: options with which it acts on the tiny test models (default: the defaults), and event: the
    event that it then counts, or a pair where the first is counted less often than the second
    ("keys kept", "keys seen"). A technique without an event has acted if the logits changed
    (approximate) or the tree did (exact).

    presets: named settings beside the defaults, such as ``{"aggressive": {"threshold": 0.5}}``,
    used as ``preset=aggressive``; further options override those of the preset. The function itself
    never sees the name."""

    def register(f):
        REGISTRY[f.__name__] = Technique(
            f.__name__, level, exact, neutral, f, after, demo or {}, event, presets or {}
        )
        return f

    return register


@cache
def names() -> dict[str, str]:
    """The module of every technique by its name, found by listing the files."""
    found = {}
    for package in PACKAGES:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            found[module.name] = f"{package}.{module.name}"
    return found


def find(name: str) -> Technique:
    """The technique of that name (``ffn_skip`` or ``ffn-skip``)."""
    known, key = names(), name.replace("-", "_")
    if key not in known:
        near = nearest(key, known)
        hint = f"did you mean {near!r}?" if near else "minitx list shows all of them."
        raise MinitxError(f"There is no technique {abbreviate(name)}; {hint}")
    if key not in REGISTRY:
        importlib.import_module(known[key])
    return REGISTRY[key]


def techniques() -> list[Technique]:
    """All techniques, in the order in which they are applied."""
    return in_order(map(find, names()))


def in_order(chosen: Iterable[Technique]) -> list[Technique]:
    """From the inside out by level; within a level, each after those in its ``after``."""
    waiting = sorted(chosen, key=lambda t: (LEVELS.index(t.level), t.name))
    order: list[Technique] = []
    while waiting:
        names = {t.name for t in waiting}
        ready = next(t for t in waiting if not names & set(t.after))
        waiting.remove(ready)
        order.append(ready)
    return order


# Applying techniques ------------------------------------------------------------------------------


def apply(lm: LM, wanted: dict[str, dict | bool], calibrate=None) -> LM:
    """Apply techniques to a language model: ``{name: options}``, True for the default options,
    False to leave it out. calibrate: what techniques that calibrate read instead of stories: a text
    or token ids (calibration.py); the result keeps it for techniques that are applied later.
    MinitxError if one does not fit the model, or two cannot be combined."""
    if calibrate is not None:
        lm = replace(lm, calibration=source_of(lm, calibrate))
    chosen: dict[str, dict] = {}
    for name, options in wanted.items():
        if not isinstance(options, dict | bool):
            raise MinitxError(
                f"{name} must be True, False or a dict of options ({{'option': value}}), got "
                f"{abbreviate(options)}."
            )
        if options is not False:
            found = find(name)
            if found.name in chosen:
                raise MinitxError(f"{found.name} is given twice; give it once, with all options.")
            chosen[found.name] = found.checked({} if options is True else options)
    if not chosen:
        return to_column_major(lm)
    # For messages: which technique removed the last part of a type, and which introduced a type.
    _check_levels(lm, map(find, chosen))
    taken: dict[type, str] = {}
    put: dict[type, str] = {}
    given, before_all = lm, lm.calibrated
    lm = replace(lm, model=to_row_major(lm.model))  # techniques work on row-major matrices
    with recording(lm) as calibrated:
        for t in in_order(map(find, chosen)):
            before = kinds(lm)
            try:
                lm = t.function(lm, **chosen[t.name])
            except NoSuchPart as error:
                raise MinitxError(_why_not(t, error, taken, put)) from None
            except MinitxError as error:
                raise _with_culprit(error, given, chosen, t) from None
            after = kinds(lm)
            taken |= dict.fromkeys(before - after, t.name)
            put |= dict.fromkeys(after - before, t.name)
    _check_rows(lm, put)
    if calibrate is not None and not calibrated:
        _warn_unused(chosen)
    return to_column_major(replace(lm, calibrated=(*before_all, *calibrated)))


def _with_culprit(error: MinitxError, given: LM, chosen: dict, t: Technique) -> MinitxError:
    """The refusal of ``t``; with the name of the technique that is in the way, if it does not say
    that already: of those applied before, one without which ``t`` fits the model as it was
    given."""
    order = [other.name for other in in_order(map(find, chosen))]
    earlier = order[: order.index(t.name)]
    if not earlier or any(name in str(error) for name in earlier) or not _fit(given, chosen, t):
        return error
    unfit = earlier  # if it is one: no need to try
    if len(earlier) > 1:
        unfit = [name for name in earlier if not _fit(given, chosen, find(name), t)]
    names = " and ".join(unfit or earlier)
    return MinitxError(
        f"{str(error).removesuffix('.')} ({t.name} fits without {names}: use one of the two)."
    )


def _fit(lm: LM, chosen: dict, *some: Technique) -> bool:
    """Can these of the chosen techniques be applied, without the others?"""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MinitxWarning)
            apply(lm, {t.name: chosen[t.name] for t in some})
    except MinitxError:
        return False
    return True


def _check_levels(lm: LM, chosen: Iterable[Technique]) -> None:
    """Refuse a technique that has to come before one that the model (a saved one, say) has already,
    if that was made for what it found."""
    kinds_of_last = {type(node) for _, node in walk(lm.model) if node.needs_inner_first}
    there = [find(name) for name in {file_of(kind) for kind in kinds_of_last} if name in names()]
    for t, earlier in itertools.product(chosen, there):
        inner = LEVELS.index(t.level) < LEVELS.index(earlier.level) or t.name in earlier.after
        if inner and t is not earlier:
            raise MinitxError(
                f"{t.name} must be applied before {earlier.name}, which this model has already; "
                f"apply both at once to the model without {earlier.name}, or use one of the two."
            )


def _warn_unused(chosen: Iterable[str]) -> None:
    names = " and ".join(chosen)
    does = "does not calibrate" if len(list(chosen)) == 1 else "do not calibrate"
    warnings.warn(
        f"{names} {does} at these settings; calibrate makes no difference.",
        MinitxWarning,
        stacklevel=3,
    )


def _check_rows(lm: LM, put: dict[type, str]) -> None:
    """Refuse a technique that needs every cache row together with one that frees rows."""
    parts = [node for _, node in walk(lm.model)]
    freeing = [node for node in parts if node.frees_rows]
    pairs = ((a, b) for a in parts if a.needs_all_rows for b in freeing if a is not b)
    for needing, freeing in pairs:
        raise MinitxError(
            f"{owner(needing, put)} needs a cache row for every token, but {owner(freeing, put)} "
            "frees some; use one of the two."
        )


def need_independent_layers(name: str, root: Part) -> None:
    """For the technique ``name``, which skips whole layers or changes their order: refuse a model
    in which a layer reads what an earlier one stores."""
    reading = next((node for _, node in walk(root) if node.reads_other_layers), None)
    if reading is not None:
        raise MinitxError(
            f"{name} changes which layers run, or their order, but with {owner(reading)} a layer "
            "reads the cache rows of an earlier one; use one of the two."
        )


def owner(node: Part, put: dict[type, str] | None = None) -> str:
    """The technique of a part: the one that introduced it, or whose file defines it."""
    return (put or {}).get(type(node)) or file_of(type(node))


def file_of(kind: type) -> str:
    """The name of the file or folder that defines a part, which is the name of its technique."""
    module = type_module = kind.__module__
    for package in PACKAGES:
        module = module.removeprefix(f"{package}.")
    return module.partition(".")[0] if module != type_module else module.rpartition(".")[2]


def _why_not(
    t: Technique, error: "NoSuchPart", taken: dict[type, str], put: dict[type, str]
) -> str:
    names = " or ".join(kind.__name__ for kind in error.kinds)
    if error.found is not None:
        found, other = type(error.found).__name__, owner(error.found, put)
        if other in REGISTRY:  # a technique's file has its name
            return (
                f"{t.name} needs a part of type {names} where {other} has put a {found}; "
                "use one of the two."
            )
        return f"{t.name} needs a part of type {names} where the model has a {found}; see its tree."
    others = {taken[kind] for kind in error.kinds if kind in taken}
    if others:
        return (
            f"{t.name} needs a part of type {names}, which {' and '.join(sorted(others))} has "
            "replaced; use one of the two."
        )
    return f"{t.name} needs a part of type {names}, and this model has none; see its tree."


class NoSuchPart(MinitxError):
    """The model has no part of these types; ``found`` is what was there instead, if one place was
    checked."""

    def __init__(self, *kinds: type, found: Part | None = None):
        self.kinds, self.found = kinds, found
        names = " or ".join(kind.__name__ for kind in kinds)
        super().__init__(f"The model has no part of type {names}.")


def swap(root: Part, kind: type, make: Callable[[Any], Part], optional: bool = False) -> Part:
    """A copy of the tree with ``make(part)`` instead of each part of exactly this type, including
    those inside other techniques' parts. Of an LM, only its model is walked: a second model inside
    ``decode`` is left alone. NoSuchPart if there is none, unless ``optional``."""
    found = False

    def change(node):
        nonlocal found
        if type(node) is not kind:
            return None
        found = True
        return make(node)

    new = _rebuild_model(root, change)
    if not found and not optional:
        raise NoSuchPart(kind)
    return new


SLOTS = {"attn": Attention, "ffn": FFN, "block": Block}  # and what a plain model has in each


def wrap(root: Part, slot: str, make: Callable[[Any, int], Part]) -> Part:
    """A copy of the tree with ``make(part, index)`` in this slot of every block: "attn", "ffn", or
    the "block" itself. ``part`` is whatever occupies the slot, including earlier wraps, so later
    wraps go outside. ``index`` is the position in the stack: a part that is used in two places is
    wrapped twice. NoSuchPart if no block has the slot."""
    nodes = [node for block in blocks_of(root) for _, node in walk(block)]
    if slot != "block" and not any(has_slot(node, slot) for node in nodes):
        raise NoSuchPart(SLOTS[slot])

    def wrap_block(block: Part, index: int) -> Part:
        if slot == "block":
            return make(block, index)

        def change(node):
            if has_slot(node, slot):
                return replace(node, **{slot: make(getattr(node, slot), index)})

        return rebuild(block, change)

    def wrap_stack(node):
        if type(node) is Stack:
            blocks = [wrap_block(block, index) for index, block in enumerate(node.blocks)]
            return replace(node, blocks=tuple(blocks))

    return _rebuild_model(root, wrap_stack)


def has_slot(node: Part, slot: str) -> bool:
    return isinstance(getattr(node, slot, None), Part)


def blocks_of(root: Part) -> tuple[Part, ...]:
    """The blocks of an LM or a model, in order."""
    model = root.model if isinstance(root, LM) else root
    found = next((node.blocks for _, node in walk(model) if type(node) is Stack), None)
    if found is None:
        raise NoSuchPart(Stack)
    return found


def _rebuild_model(root: Part, change: Callable) -> Part:
    if not isinstance(root, LM):
        return rebuild(root, change)
    model = rebuild(root.model, change)
    return root if model is root.model else replace(root, model=model)


def decides(model: Part) -> str:
    """How a model decides what to skip (see ``Part``): "step" if any of its parts does, so that
    only the same steps give the same result; "sequence" if any decides once, from the prompt, so
    that the division of what follows does not matter; else "token"."""
    ways = {node.decides for _, node in walk(model)}
    return next(way for way in ("step", "sequence", "token") if way in ways)


def need(node: Part, *kinds: type) -> None:
    """Raise NoSuchPart unless the part has one of these types."""
    if type(node) not in kinds:
        raise NoSuchPart(*kinds, found=node)


def kinds(root: Part) -> set[type]:
    """The types of all parts of the tree."""
    return {type(node) for _, node in walk(root)}


# Cards --------------------------------------------------------------------------------------------

HEADINGS = (
    "Paper", "Fidelity", "Kind", "Idea", "Offline",
    "Online", "Saves", "In NumPy", "Not for", "Proof", "Tutorial",
)  # fmt: skip


@dataclass(frozen=True)
class Card:
    """A technique's docstring: a one-line summary, and a text under each of ``HEADINGS``."""

    summary: str
    sections: dict[str, str]


def read_card(text: str) -> Card:
    """Parse a docstring whose sections begin with ``Heading:`` at the start of a line."""
    lines = inspect.cleandoc(text).splitlines()
    sections: dict[str, list[str]] = {}
    summary: list[str] = []
    current = summary
    for line in lines:
        heading, colon, rest = line.partition(":")
        if colon and heading in HEADINGS:
            current = sections.setdefault(heading, [])
            line = rest.strip()
        current.append(line)
    found = {heading: inspect.cleandoc("\n".join(body)) for heading, body in sections.items()}
    return Card(" ".join(" ".join(summary).split()), found)
