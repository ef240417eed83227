"""``switchable.safetensors``: the trained policies of a model, beside its weights.

Tensors, in float32: ``tolerances`` and ``shares`` (P,), ``order`` (U,), and for each policy
``policies.0.w1``, ``policies.0.b1``, ..., ``tokens.0.w``, ... (policy.py). The metadata holds a
fingerprint of the weights that the policies were trained for.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from minitx.checkpoints.common import fingerprint, need_finite
from minitx.checkpoints.safetensors import read_header, read_tensors
from minitx.checkpoints.safetensors_write import write_safetensors
from minitx.errors import MinitxError
from minitx.skip.switchable.policy import HIDDEN, PolicyNetwork, TokenPolicy

FILE = "switchable.safetensors"


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
    write_safetensors(Path(folder) / FILE if path is None else path, tensors, "F32", metadata)


def read_policies(folder, width: int, units: int, dtype=np.float32) -> Policies:
    """The policies of a model of this width with so many units. MinitxError if the file is damaged,
    does not fit the model, or was trained for other weights than those in the folder."""
    path = Path(folder) / FILE
    found = read_tensors(path)
    count = found["tolerances"].size if "tolerances" in found else 0
    expected = shapes(count, width, units)
    for name, shape in expected.items():
        if name not in found or found[name].shape != shape:
            what = f"the shape {found[name].shape}" if name in found else "no such tensor"
            raise MinitxError(
                f"{path}: {name} has {what}; switchable expected {shape} for a model of width "
                f"{width} with {units} units. Is it another model's file?"
            )
        need_finite(path, name, found[name])
    if unknown := sorted(set(found) - set(expected)):
        raise MinitxError(f"{path}: unexpected tensor {unknown[0]!a}; is it another model's file?")
    if sorted(found["order"]) != list(range(units)):
        raise MinitxError(f"{path}: order does not name each of the {units} units once.")
    if read_header(path).metadata.get("weights") != weights_fingerprint(folder):
        raise MinitxError(
            f"{path}: was not trained for the weights beside it; delete it, or train policies with "
            "python -m minitx.skip.switchable.train."
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
        for i in range(count)
    ]
    policies.sort(key=lambda p: p.tolerance)
    return Policies(tuple(policies), found["order"].astype(int))


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


def weights_fingerprint(folder) -> str:
    """The fingerprint of the weights in the folder: one file, or its shards."""
    return fingerprint(*sorted(Path(folder).glob("model*.safetensors")))
