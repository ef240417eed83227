"""Mixture-of-Depths: routers learn together with their model (Raposo et al., 2024).

    in each routed block: x_i + r_i f(X)_i for the k = max(1, int(capacity T)) tokens i of a row
                          with the largest r; x_i for the others
    loss = L_model + weight * mean BCE(sigmoid(r_i), is i among the k?)

Ranking the tokens of a row looks at later ones, which decoding cannot. So the binary cross-entropy
teaches r itself to tell: above 0 for a token that is among the k, below 0 for the others, which is
the decision that ``minitx.skip.mixture_of_depths`` makes. The mean is over tokens and routed
blocks. The routers learn from L_model too, since r_i weighs what the block adds.

A recipe trains so with "start", "techniques": {"mixture_of_depths": ...} and in each stage
"router": {"capacity": ..., "weight": ...}.
"""

from pathlib import Path

import numpy as np

from minitx.checkpoints.huggingface import write_model
from minitx.model import Transformer
from minitx.skip.mixture_of_depths import RoutedBlock
from minitx.skip.mixture_of_depths.file import Trained, write_routers
from minitx.state import Layer, Tokens
from minitx.technique import blocks_of, swap
from minitx.training.autograd import gradients
from minitx.training.autograd.array import value_of
from minitx.tree import Part, part

# The loss ----------------------------------------------------------------------------------------


def routed_gradients(model, loss, capacity: float, weight: float, rows) -> tuple:
    """The gradients of ``routed_loss`` by path; the model's loss; and the routers'."""
    _, found, (value, error) = gradients(
        model, lambda traced: routed_loss(traced, loss, capacity, weight, rows)
    )
    return found, float(value), float(error)


def routed_loss(model, loss, capacity: float, weight: float, rows):
    """(loss + weight * W * error, (loss, W * error)) for ``loss(model)``, a sum over tokens whose
    weights rows (B, T) add up to W, and the mean cross-entropy of the routers.

    The caller divides by W, or by the W of several parts of a batch (as in detector.joint_loss).
    """
    found: list[tuple] = []

    def change(block: RoutedBlock) -> Part:
        return TopKBlock(block.inner, block.router, capacity, found)

    value = loss(swap(model, RoutedBlock, change))
    error = router_loss(found, rows > 0) * float(rows.sum(dtype=np.float64))
    return value + error * weight, (value, error)


def router_loss(found: list[tuple], rows):
    """The mean binary cross-entropy of sigmoid(r) with what was selected, over all blocks and the
    tokens where rows (B, T) is True. found: r (B, T) and the selected positions (B, k)."""
    total = 0
    for r, selected in found:
        y = np.zeros(r.shape, r.dtype)
        np.put_along_axis(y, selected, 1, -1)
        # -y log sigmoid(r) - (1 - y) log(1 - sigmoid(r)) = softplus(r) - y r
        softplus = np.maximum(r, 0) + np.log(1 + np.exp(-abs(r)))
        total = total + ((softplus - r * y) * rows).sum()
    return total * (1 / max(int(rows.sum()) * len(found), 1))


@part
class TopKBlock(Part):
    """A routed block as it is trained: in each row of the batch, the k tokens with the largest r
    enter. They are gathered, so that the block has k / T of the work. Padding may be among them:
    train on full rows (chain)."""

    inner: Part  # the block
    router: Part
    capacity: float
    found: list  # of ``router_loss``

    def __call__(self, x, layer: Layer):
        """x (B, T, D) -> (B, T, D)."""
        B, T, D = x.shape
        r = self.router.scores(x)  # (B, T)
        selected = top_k(value_of(r), max(1, int(self.capacity * T)))  # (B, k)
        self.found.append((r, selected))
        k = selected.shape[1]
        flat = (np.arange(B)[:, None] * T + selected).reshape(-1)  # (B*k,): rows of x (B*T, D)
        inside = x.reshape(B * T, D)[flat].reshape(B, k, D)
        tokens = layer.tokens
        layer.tokens = RowTokens(selected)
        f = self.inner(inside, layer) - inside
        layer.tokens = tokens
        added = f.reshape(B * k, D) * r.reshape(B * T)[flat][:, None]
        place = np.full(B * T, B * k)  # where each token finds what is added: the last row is 0
        place[flat] = np.arange(B * k)
        added = np.concatenate([added, np.zeros((1, D), x.dtype)])
        return x + added[place].reshape(B, T, D)


def top_k(r, k: int):
    """(B, k): the positions of the k largest r (B, T) of each row, in ascending order. Ties go to
    the lower index."""
    return np.sort(np.argsort(-r, axis=-1, kind="stable")[:, :k], -1)


class RowTokens(Tokens):
    """Tokens at other positions (B, k) in each row, in ascending order: they attend among
    themselves, causally, as if they were consecutive."""

    def __init__(self, positions):
        self.positions = self.lookup = positions
        self.start = np.zeros(len(positions), int)  # as in a ragged batch: angles for each row
        self.end = positions.shape[1]  # k, as in a whole sequence of k tokens: a causal mask

    def __len__(self) -> int:
        return self.end


# The routers of a training run -------------------------------------------------------------------


def write_routed(model: Transformer, capacity: float, folder: Path, dtype: str) -> None:
    """Write the model without its routers as a Hugging Face folder, and beside it their file."""
    routers = {
        i: block.router.vector * np.float32(block.router.scale)
        for i, block in enumerate(blocks_of(model))
        if type(block) is RoutedBlock
    }
    write_model(swap(model, RoutedBlock, lambda block: block.inner), folder, dtype)
    write_routers(Trained(routers, capacity), folder)
