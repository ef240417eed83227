"""Calibration of ffn_skip: propose cold layers and a threshold for a wanted share of skipped FFNs.

changed = apply(lm, {"ffn_skip": calibrate(lm, texts, rate=0.2)})
"""

from collections.abc import Sequence

import numpy as np

from minitx import ledger
from minitx.calibration import calibration_ids
from minitx.errors import MinitxError
from minitx.progress import bar
from minitx.shared.cosine import cosine
from minitx.skip.ffn_skip import default_skip, ffn_skip
from minitx.state import Layer
from minitx.technique import blocks_of, find, wrap
from minitx.tree import Part, part

TEXTS = 16  # stories or passages, if no texts are given


def calibrate(
    lm, texts: Sequence | None, rate: float, skip: int | None = None, warm_up: int = 25
) -> dict:
    """Options of ``ffn_skip`` that skip about the share ``rate`` of all FFNs after the warm-up.

    texts: lists of ids, or strings; None: what the model calibrates on (``lm.calibration``, or
    stories). Cold are the layers at either end whose mean cosine is below
    the mean over all layers. The threshold is one of the cosines measured, found by bisection; each
    candidate is run, because skipping changes the cosines of later layers. MinitxError if no text
    is longer than the warm-up, or if that many FFNs cannot be skipped.
    """
    find("ffn_skip").checked({"skip": skip, "warm_up": warm_up})
    texts = calibration_ids("ffn_skip", lm, TEXTS, "give texts") if texts is None else texts
    cosines = similarities(lm, texts, warm_up)  # (L, tokens)
    mean = cosines.mean(1)
    average = min(mean.mean(), mean.max())  # rounding may lift the mean above all of them
    similar = np.flatnonzero(mean >= average)
    cold_start, cold_end = int(similar[0]), int(similar[-1]) + 1
    options = {
        "cold_start": cold_start,
        "cold_end": cold_end,
        "skip": default_skip(len(mean)) if skip is None else skip,
        "warm_up": warm_up,
    }

    def share(threshold: float) -> float:
        return count_skipped(ffn_skip(lm, threshold=threshold, **options), texts) / cosines.size

    most = share(-2)  # every cosine reaches this threshold
    if not 0 <= rate <= most:
        raise MinitxError(
            f"ffn_skip: rate must be 0 to {most:.3g} on these texts, with skip={options['skip']} "
            f"and the layers {cold_start} to {cold_end - 1}; got {rate:g}."
        )
    candidates = np.unique(cosines[cold_start:cold_end])  # in ascending order
    low, high = 0, len(candidates)  # candidates[low] skips enough, candidates[high] too few
    while high - low > 1:
        middle = (low + high) // 2
        if share(float(candidates[middle])) >= rate:
            low = middle
        else:
            high = middle
    return options | {"threshold": float(candidates[low])}


def similarities(lm, texts: Sequence, warm_up: int = 0) -> np.ndarray:
    """Cosines (L, tokens) between a and a + FFN(a) in the dense model, of each layer and of each
    token of some texts (lists of ids, or strings) from position ``warm_up`` on."""
    found: list[list] = [[] for _ in blocks_of(lm)]
    probed = wrap(lm, "ffn", lambda ffn, index: SimilarityProbe(ffn, found[index]))
    for text in bar(texts, "ffn skip: cosines", unit="text", delay=1.0):
        probed.model.hidden(lm.encode(text))
    rows = [[c[warm_up:] for c in row] for row in found]
    if not any(map(len, rows[0])):
        raise MinitxError(
            f"ffn_skip: expected a text longer than the warm-up of {warm_up} tokens; "
            "give longer texts, or a smaller warm_up."
        )
    return np.stack([np.concatenate(row) for row in rows])


@part
class SimilarityProbe(Part):
    """An FFN that also records the cosine of every token."""

    inner: Part
    found: list  # of arrays (T,), one for each text

    def __call__(self, x, layer: Layer):
        f = self.inner(x, layer)
        self.found.append(cosine(x, x + f))
        return f


def count_skipped(lm, texts) -> int:
    """How many FFNs are skipped while the texts are run."""
    with ledger.counting(lm) as counts:
        for text in bar(texts, "ffn skip: try a threshold", unit="text", delay=1.0):
            lm.model.hidden(lm.encode(text))
    return counts.events["FFNs skipped"]
