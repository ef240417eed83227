"""Baselines of ffn_skip: skip as many FFNs by a fixed plan, whatever the token."""

import numpy as np

from minitx.errors import MinitxError
from minitx.skip.ffn_skip import past_warm_up, run_except
from minitx.state import Layer
from minitx.technique import blocks_of, wrap
from minitx.tree import Part, part, table


def skip_by_plan(lm, choose: str, rate: float, region: range, warm_up: int, seed: int):
    """The model whose FFNs in the region are skipped by a plan for all positions."""
    plan = make_plan(choose, rate, region, len(blocks_of(lm)), lm.model.config.context, seed)

    def change(ffn: Part, index: int) -> Part:
        return PlannedFFN(ffn, plan[index - region.start], warm_up) if index in region else ffn

    return wrap(lm, "ffn", change)


def make_plan(choose: str, rate: float, region: range, L: int, context: int, seed: int):
    """(layers of the region, context) booleans: which FFNs are skipped at which positions, so that
    a token skips rate * L of all L FFNs on average.

    random: each FFN of the region with the same probability. static: with rate * L = n + f, the
    last n FFNs of the region always, and the one before them at a share f of the positions.
    """
    if rate * L > len(region):
        raise MinitxError(
            f"ffn_skip: rate must be at most {len(region) / L:g}, since {len(region)} of the {L} "
            f"FFNs are not cold; got {rate:g}."
        )
    if choose == "random":
        p = np.full(len(region), rate * L / max(len(region), 1))
    else:
        p = np.clip(rate * L - np.arange(len(region))[::-1], 0, 1)
    return np.random.default_rng(seed).random((len(region), context)) < p[:, None]


@part
class PlannedFFN(Part):
    """An FFN that is skipped at fixed positions."""

    inner: Part
    skipped: np.ndarray = table()  # (context,) booleans
    warm_up: int = 0

    def __call__(self, x, layer: Layer):
        skippable = past_warm_up(self.warm_up, x, layer)  # (..., T)
        skipped = skippable & self.skipped[layer.tokens.own]
        return run_except(self.inner, x, layer, skipped, skippable)
