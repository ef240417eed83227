"""Predictive attention: low-bit products predict the scores; only promising keys are scored.

The card and the options, the selector and its predictor (online), notes.
"""

import math
from typing import Annotated, Literal

import numpy as np

from minitx import ledger
from minitx.errors import MinitxError
from minitx.model import Attend
from minitx.shared.coarse import coarse_scales
from minitx.shared.sparse_attention import SparseAttention, Visible, per_key, top_k
from minitx.shared.symmetric import quantize_symmetric
from minitx.state import Layer
from minitx.technique import above, at_least, between, swap, technique
from minitx.tree import Part, part


@technique(
    level="scores",
    exact=False,
    neutral={"threshold": 0.0, "share": 1.0},
    demo={"threshold": 0.2, "share": 1.0},
    event=("keys kept", "keys seen"),
    presets={"aggressive": {"threshold": 0.2}, "threshold-only": {"threshold": 0.05, "share": 1.0}},
)
def predictive_attention(
    lm,
    *,
    bits: Annotated[int, "bits of each number in codes=integer", between(2, 8)] = 4,
    threshold: Annotated[
        float,
        "keep keys whose predicted weight is at least this part of the query's largest predicted "
        "weight; 0: all",
        between(0, 1),
    ] = 0.05,
    share: Annotated[
        float, "keep at most this share of the keys that a query sees; 1: all", above(0, 1)
    ] = 0.25,
    min_keys: Annotated[int, "share never leaves fewer keys than this", at_least(1)] = 4,
    codes: Annotated[
        Literal["integer", "leading-one"],
        "what scores are predicted from: integers, or sign(x) 2^floor(log2|x|) instead of each x, "
        "which needs threshold=0 and a share below 1",
    ] = "integer",
):
    """Predict scores from low-bit integers, then score only the keys that look relevant.

    Paper:     Chen et al., "Enabling Energy-Efficient Inference for Self-Attention Mechanisms in
               Neural Networks", AICAS 2022, doi 10.1109/AICAS54282.2022.9869924.
    Fidelity:  a reconstruction: only the abstract is public. It names a prediction-based
               approximate self-attention on an FPGA; how it predicts, what it keeps and whether it
               trains anything is unconfirmed. All of the following is ours.
    Kind:      approximate; exact at threshold=0 share=1, which keep every key.
    Idea:      A few bits of each number suffice to tell which scores are too small to matter. So
               predict all scores cheaply, and compute only the promising ones exactly.
    Offline:   nothing.
    Online:    for each vector x (d,) after RoPE (every query; every key once, when it is new):
                   m = 2^(bits-1) - 1;   scale(x) = max|x| / m;   code(x) = rint(x / scale(x))
               predicted[j] = scale(q) scale(k_j) (code(q) . code(k_j)) / sqrt(d)
               of the n keys that a query sees keep those with
                   predicted[j] >= max(predicted) - ln(1 / threshold)    (threshold=0: all)  and
                   predicted[j] among the max(min_keys, ceil(share n)) largest;
               exact scores, softmax and weighted sum over those only
    Saves:     S d + 2 r d instead of 2 S d multiply-adds per query head and decoded token when r of
               S cached keys are kept; in hardware the S d are products of few bits. Prompts: none.
               On stories of 512 tokens only cache reads fall (0.55x), not all multiply-adds.
    In NumPy:  slower than dense at every context tried, up to 4,000 keys: predicting takes as long
               as scoring all keys, and selecting reads the predictions several times more.
    Not for:   vectors with an outlying coordinate at bits=2: it takes up the whole scale, and the
               others are coded as 0.
    Proof:     tests/skip/test_predictive_attention.py; literal version:
               tests/skip/literal_predictive_attention.py
    Tutorial:  tutorials/07_four_ways_to_find_keys.py
    """
    if codes == "leading-one" and (threshold > 0 or share == 1):
        raise MinitxError(
            f"predictive_attention: codes=leading-one needs threshold=0 and a share below 1, got "
            f"threshold={threshold:g} share={share:g}; it scales the predicted scores down by an "
            "unknown factor and only roughly keeps their order, so select by share."
        )
    predictor = Predictor(IntegerCode(bits) if codes == "integer" else LeadingOne())

    def sparse(dense: Attend) -> SparseAttention:
        selector = PredictedKeys(predictor, dense.scale, threshold, share, min_keys)
        return SparseAttention(selector, dense.scale)

    return swap(lm, Attend, sparse)


# Online ------------------------------------------------------------------------------------------


@part
class PredictedKeys(Part):
    """The selector: keeps the keys whose predicted score is high enough."""

    predictor: Part
    scale: float  # 1 / sqrt(d)
    threshold: float
    share: float
    min_keys: int

    def __call__(self, q, k, known, visible: Visible):
        codes, scales = known
        p = self.predictor(q, codes[..., : visible.S, :], scales[..., : visible.S])
        p *= self.scale  # (..., K, G, T, S)
        p = visible.hide(p)  # first, so that no later key counts in the maximum or the ranking
        return survivors(p, visible.count, self.threshold, self.share, self.min_keys)

    def keeps_all(self, S: int) -> bool:
        return self.threshold == 0 and self.share == 1

    def remember(self, k, layer: Layer):
        """Codes (..., K, S, d) and scales (..., K, S) of all cached keys."""
        return per_key(self, k, self.predictor.code, layer)


def survivors(p, n, threshold: float, share: float, min_keys: int):
    """Which keys to keep: booleans like the predicted scores p (..., T, S), which are MASKED where
    a key is not visible. n: how many keys each query sees, integers that broadcast to (..., T).
    Every query keeps at least one key."""
    # threshold=0: masked keys pass here, but share is below 1 then (``keeps_all``), and top_k drops
    # them
    gap = -math.log(threshold) if threshold else math.inf
    kept = p >= p.max(-1, keepdims=True) - gap
    if share == 1:
        return kept
    most = np.ceil(share * n - 1e-9).astype(int)  # 1e-9: 0.07 * 100 = 7.000000000000001 counts as 7
    return kept & top_k(p, np.minimum(n, np.maximum(min_keys, most)))


@part
class Predictor(Part):
    """Predicts q . k from codes. A part, so that its work is counted apart from the exact work."""

    code: Part

    def __call__(self, q, key_codes, key_scales):
        """q (..., H, T, d), codes (..., K, S, d) and scales (..., K, S) -> (..., K, G, T, S)"""
        *lead, H, T, d = q.shape
        K, S = key_codes.shape[-3], key_codes.shape[-2]
        read = key_codes.nbytes + key_scales.nbytes
        ledger.count(q.size * S, cache_bytes=read, bits=self.code.bits)
        codes, scales = self.code(q)
        codes = codes.reshape(*lead, K, H // K * T, d).astype(q.dtype)
        # Multiplied as floats, since BLAS has no integers. codes=integer: the sums are integers
        # below 2^24 (at 8 bits up to d = 1040), so exact in any order: a chunk predicts exactly
        # what single tokens do.
        p = codes @ key_codes.astype(q.dtype).swapaxes(-1, -2)  # (..., K, G*T, S)
        p *= key_scales[..., None, :]  # integers of different keys are not comparable
        p = p.reshape(*lead, K, H // K, T, S)
        p *= scales.reshape(p.shape[:-1])[..., None]
        return p


@part
class IntegerCode(Part):
    """Each vector as integers of ``bits`` bits with a scale of its own."""

    bits: int

    def __call__(self, x):
        """x (..., d) -> codes (..., d) int8, scales (...)"""
        codes, scales = quantize_symmetric(x, self.bits)
        return codes.astype(np.int8), coarse_scales(scales)


@part
class LeadingOne(Part):
    """Each number rounded toward 0 to a power of two; all scales are 1."""

    bits = None  # counted as floats, whose exponents they are

    def __call__(self, x):
        """x (..., d) -> codes (..., d), scales (...), both in the dtype of x"""
        exponent = np.frexp(x)[1]  # |x| = m 2^exponent with 1/2 <= m < 1
        return np.ldexp(np.sign(x), exponent - 1), np.ones_like(x[..., 0])


# Notes:
#
# - The prediction only selects; weights come from exact scores. So threshold=0 share=1 is exact at
#   any number of bits (nothing is predicted then), and many bits alone are not exact.
# - Scales are rounded to 20 bits (shared/coarse.py): keys with equal codes often have scales that
#   differ by rounding alone, and which of them share keeps should not depend on that.
# - Scales are per vector: one for all keys would change when a larger key arrives, and with it the
#   codes of those before. A vector of zeros has the scale 1.
# - The threshold is relative to a query's largest predicted weight, so that every query keeps a
#   key. With an absolute one, softmax(predicted) > threshold, a query could be left without keys
#   when its weights are nearly equal and it sees more than 1 / threshold keys. Ties at the edge of
#   share go to the lower index.
# - codes=leading-one lets hardware add exponents instead of multiplying. It roughly keeps the order
#   of the scores, but scales them down by an unknown factor, so it can only be used with
#   threshold=0 and a share below 1; bits is not used, and all scales are 1.
# - Not here: several rounds of prediction, prediction before q and k exist.
# - Cache reads per token: S (d + 4) bytes for each key head (int8 codes, float32 scales; with
#   leading-one S (4 d + 4)) and 8 r d for each query head, since heads that share keys keep
#   different ones, instead of 8 S d for each key head. The cache grows by d + 4 bytes per key and
#   key head.
# - For a prompt 3 S d are computed instead of 2 S d, since many queries are faster in one dense
#   product than gathered; "keys kept" of "keys seen" tells what hardware could skip. Coding,
#   rescaling and sorting take a few operations per number and are not counted.
