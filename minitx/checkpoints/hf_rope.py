"""Read the rotary settings (RoPE) of a Hugging Face ``config.json``, in any of their spellings.

transformers 5 stores them in one object, ``rope_parameters``. Older versions stored the base at the
top level (``rope_theta``; GPT-NeoX: ``rotary_emb_base`` and ``rotary_pct``) and the scaling in
``rope_scaling``. transformers 5 reads ``rope_scaling`` instead of ``rope_parameters`` if both are
there, and a value inside of it instead of one at the top level. A file in which two spellings
disagree is refused: its author meant one of them, and transformers may read the other.
"""

from dataclasses import dataclass

from minitx.checkpoints.common import abbreviate
from minitx.checkpoints.json_object import JsonObject
from minitx.errors import MinitxError

LARGEST, SMALLEST = 1e30, 1e-6  # outside this range float32 angles are Inf


@dataclass(frozen=True)
class RopeNames:
    """The spellings at the top level that count in one architecture, and its default."""

    base: str
    fraction: str
    default_fraction: float
    ignored: tuple[str, ...] = ()  # spellings that transformers ignores there


LLAMA = RopeNames("rope_theta", "partial_rotary_factor", 1.0)
GPT_NEOX = RopeNames("rotary_emb_base", "rotary_pct", 0.25, ("rope_theta", "partial_rotary_factor"))


def read_rope(c: JsonObject, names: RopeNames) -> tuple[float, dict]:
    """The fraction of a head's columns that is rotated, and the fields ``rope_...`` of ``Config``
    except the width. MinitxError for kinds of scaling that minitx lacks, or for a contradiction."""
    places = [name for name in ("rope_scaling", "rope_parameters") if c.object(name).fields]
    found = [_settings(c, name, names) for name in places or ["rope_parameters"]]
    if found[0] != found[-1]:
        raise MinitxError(
            f"{c.path}: 'rope_scaling' {abbreviate(c.fields['rope_scaling'])} and "
            f"'rope_parameters' {abbreviate(c.fields['rope_parameters'])} disagree; remove one of "
            "them (transformers reads 'rope_scaling')."
        )
    return found[0]


def _settings(c: JsonObject, place: str, names: RopeNames) -> tuple[float, dict]:
    """The settings that the object in the field ``place`` and the top level give together."""
    where = c.object(place)
    base = _agreeing(c, [(where, "rope_theta"), (c, names.base)], 10000.0)
    fraction = _agreeing(
        c, [(where, "partial_rotary_factor"), (c, names.fraction)], names.default_fraction
    )
    for name, value in zip(names.ignored, (base, fraction), strict=False):
        _agreeing(c, [(c, name)], value, f"the value that counts in this architecture, {value}")
    if not 1 <= base <= LARGEST:
        raise MinitxError(f"{c.path}: {names.base!r} must be from 1 to 1e30, got {base}.")
    if fraction > 1:
        raise MinitxError(f"{c.path}: {names.fraction!r} must be at most 1, got {fraction}.")
    return fraction, {"rope_base": base} | _scaling(c, place)


def _scaling(c: JsonObject, place: str) -> dict:
    where = c.object(place)
    kind = where.string("rope_type", where.string("type", "default"))
    if kind not in ("default", "linear", "llama3") or any(
        isinstance(value, dict) for value in where.fields.values()
    ):
        raise MinitxError(
            f"{c.path}: {place!r} asks for RoPE scaling that is not supported "
            f"({abbreviate(where.fields)}); expected rope_type 'default', 'linear' or 'llama3', "
            "the same in all layers."
        )
    if kind == "default":
        return {}
    scaling = {"rope_factor": _in_range(where, "factor")}
    if kind == "linear":
        return scaling
    low, high = (_in_range(where, f"{which}_freq_factor") for which in ("low", "high"))
    if low >= high:
        raise MinitxError(
            f"{c.path}: 'low_freq_factor' must be below 'high_freq_factor', got {low} and {high}."
        )
    name = "original_max_position_embeddings"
    trained = {place.positive_int(name, None) for place in (c, where)} - {None}
    if len(trained) > 1:
        raise MinitxError(f"{c.path}: two values of {name!r} disagree; remove one of them.")
    return scaling | {
        "rope_trained_context": min(trained, default=c.positive_int("max_position_embeddings")),
        "rope_low_turns": low,
        "rope_high_turns": high,
    }


def _in_range(where: JsonObject, name: str) -> float:
    value = where.positive_float(name)
    if not SMALLEST <= value <= LARGEST:
        raise MinitxError(
            f"{where.path}: {name!r} must be from {SMALLEST} to {LARGEST}, got {value}."
        )
    return value


def _agreeing(
    c: JsonObject, spellings: list[tuple[JsonObject, str]], default: float, expected: str = ""
) -> float:
    """The value of a setting that has several spellings, or the default; MinitxError if they
    disagree. ``expected`` describes a default that they must agree with too."""
    found = {}
    for where, name in spellings:
        value = where.positive_float(name, None)
        if value is not None:
            found.setdefault(value, f"{name!r} {value}")
    if expected:
        found.setdefault(default, expected)
    if len(found) > 1:
        raise MinitxError(f"{c.path}: {' and '.join(found.values())} disagree; remove one of them.")
    return next(iter(found), default)
