"""``switchable.safetensors``: the trained policies of a model, beside its weights.

Tensors, in float32: ``tolerances`` and ``shares`` (P,), ``order`` (U,), and for each policy
``policies.0.w1``, ``policies.0.b1``, ..., ``tokens.0.w``, ... (policy.py). The metadata holds two
fingerprints: of the weights that the policies were trained for, and of these tensors.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from minitx.checkpoints.common import arrays_fingerprint, need_finite, weights_fingerprint
from minitx.checkpoints.safetensors import read_header, read_tensors
from minitx.checkpoints.safetensors_write import write_safetensors
from minitx.errors import MinitxError
from minitx.skip.switchable.policy import HIDDEN, PolicyNetwork, TokenPolicy
from minitx.values import Range, above, between

FILE = "switchable.safetensors"
TOLERANCES, SHARES = above(0, 1000), between(0, 1)
COUNTS = between(1, 100)  # of policies
WEIGHTS = between(-1e12, 1e12)  # larger ones could overflow in the policy
AGAIN = "train policies with python -m minitx.skip.switchable.train"


@dataclass(frozen=True)
class Trained:
    """A policy trained for a tolerance, in nats."""

    tolerance: float
    share: float  # of the units' multiply-adds: what it runs on average, on its training texts
    network: PolicyNetwork
    tokens: TokenPolicy | None


@dataclass(frozen=True)
class Policies:
    """What is known of a model: policies by ascending tolerance, and the order in which the best
    static plan removes units."""

    policies: tuple[Trained, ...]
    order: np.ndarray  # (U,)

    def within(self, tolerance: float) -> Trained | None:
        """The policy with the largest tolerance that is not above this one, if there is any."""
        found = [p for p in self.policies if p.tolerance <= tolerance * (1 + 1e-6)]
        return found[-1] if found else None


def write_policies(found: Policies, folder, path=None) -> None:
    """Write the policies into ``path`` (default: into the folder that holds the weights)."""
    tensors = {
        "tolerances": np.array([p.tolerance for p in found.policies]),
        "shares": np.array([p.share for p in found.policies]),
        "order": found.order.astype(np.float64),
    }
    for i, p in enumerate(found.policies):
        tensors |= {f"policies.{i}.{name}": w for name, w in vars(p.network).items()}
        tensors |= {f"tokens.{i}.{name}": w for name, w in vars(p.tokens).items()}
    metadata = {"format": "minitx policies", "weights": weights_fingerprint(folder)}
    metadata |= {"policies": arrays_fingerprint(tensors)}
    write_safetensors(Path(folder) / FILE if path is None else path, tensors, "F32", metadata)


def read_policies(folder, width: int, units: int, dtype=np.float32) -> Policies:
    """The policies of a model of this width with so many units. MinitxError if the file is damaged,
    does not fit the model, or was trained for other weights than those in the folder."""
    path = Path(folder) / FILE
    found, metadata = read_tensors(path), read_header(path).metadata
    check_tensors(path, found, width, units)
    if metadata.get("weights") != weights_fingerprint(folder):
        raise MinitxError(
            f"{path}: was not trained for the weights beside it; delete it, or {AGAIN}."
        )
    if metadata.get("policies") != arrays_fingerprint(found):
        raise MinitxError(
            f"{path}: its tensors do not match their fingerprint, so it was changed after it was "
            f"written; bring the original back, or {AGAIN}."
        )
    if len(found["order"]) > units:
        raise MinitxError(
            f"switchable: {path} decides about {len(found['order'])} units, and this model no "
            f"longer has all of them (it has {units}), since a technique has removed layers; use "
            "choose=random with a share, or leave one of the two out."
        )

    def read(kind, prefix: str):
        return kind(*(found[f"{prefix}.{f.name}"].astype(dtype) for f in fields(kind)))

    policies = [
        Trained(
            float(found["tolerances"][i]),
            float(found["shares"][i]),
            read(PolicyNetwork, f"policies.{i}"),
            read(TokenPolicy, f"tokens.{i}"),
        )
        for i in range(len(found["tolerances"]))
    ]
    policies.sort(key=lambda p: p.tolerance)
    return Policies(tuple(policies), found["order"].astype(int))


def check_tensors(path: Path, found: dict[str, np.ndarray], width: int, units: int) -> None:
    """MinitxError unless these are policies for a model of this width with ``units`` units, or with
    more, of which a technique has removed some."""
    if "order" in found:
        units = max(units, found["order"].size)
    count = found["tolerances"].size if "tolerances" in found else 1
    if count not in COUNTS:
        raise MinitxError(f"{path}: expected {COUNTS} policies, got {count}; {AGAIN}.")
    expected = shapes(count, width, units)
    for name, shape in expected.items():
        if name not in found or found[name].shape != shape:
            what = f"the shape {found[name].shape}" if name in found else "no such tensor"
            raise MinitxError(
                f"{path}: {name} has {what}; switchable expected {shape} for a model of width "
                f"{width} with {units} units. Is it another model's file?"
            )
        need_finite(path, name, found[name])
        need_range(path, name, found[name])
    if unknown := sorted(set(found) - set(expected)):
        raise MinitxError(f"{path}: unexpected tensor {unknown[0]!a}; is it another model's file?")
    if sorted(found["order"]) != list(range(units)):
        raise MinitxError(f"{path}: order does not name each of the {units} units once; {AGAIN}.")


def need_range(path: Path, name: str, array: np.ndarray) -> None:
    allowed: Range = {"tolerances": TOLERANCES, "shares": SHARES}.get(name, WEIGHTS)
    outside = [x for x in array.ravel().tolist() if x not in allowed]
    if outside:
        raise MinitxError(
            f"{path}: expected numbers {allowed} in {name}, got {outside[0]:g}; {AGAIN}."
        )


def shapes(count: int, width: int, units: int) -> dict[str, tuple]:
    """The shape of every tensor of a file with ``count`` policies."""
    found = {"tolerances": (count,), "shares": (count,), "order": (units,)}
    for i in range(count):
        found[f"policies.{i}.w1"] = (width, HIDDEN)
        found[f"policies.{i}.b1"] = (HIDDEN,)
        found[f"policies.{i}.w2"] = (HIDDEN, units)
        found[f"policies.{i}.b2"] = (units,)
        found[f"tokens.{i}.w"] = found[f"tokens.{i}.v"] = (width, 1)
        found[f"tokens.{i}.b"] = (1,)
    return found
