"""Predict-then-compute attention: cheap scores choose the keys, exact ones weigh them.

After Chen et al. 2022, of which only the abstract is public: a reconstruction, see the card.
Another width of the codes, or another rule for what is kept, is a setting. What related designs do
besides (several rounds of prediction, prediction before q and k exist) is not done here.
"""

import math
from typing import Literal

import numpy as np

from minitx import ledger
from minitx.errors import MinitxError
from minitx.model import Attend
from minitx.shared.sparse_attention import SparseAttention, Visible, per_key, top_k
from minitx.shared.symmetric import quantize_symmetric
from minitx.state import Layer
from minitx.technique import swap, technique
from minitx.tree import Part, part


@technique(
    level="scores",
    exact=False,
    neutral={"tau": 0.0, "rho": 1.0},
    demo={"tau": 0.2},
    event=("keys kept", "keys seen"),
)
def predictive_attention(
    lm,
    *,
    b: int = 4,
    tau: float = 0.05,
    rho: float = 1.0,
    r_min: int = 4,
    codes: Literal["integer", "leading-one"] = "integer",
):
    """Scores are predicted from short codes; only keys that look relevant are scored exactly.

    Paper: Q. Chen, C. Sun, Z. Lu and C. Gao, 2022, "Enabling Energy-Efficient Inference for
        Self-Attention Mechanisms in Neural Networks", AICAS 2022, pp. 25-28,
        doi 10.1109/AICAS54282.2022.9869924. Details inferred: only the abstract is public. It
        establishes a prediction-based approximate self-attention on an FPGA, made together with its
        hardware. How the paper predicts, what it keeps and whether it trains anything is
        unconfirmed; all that follows, each setting included, was chosen here from the family of
        such designs, and no figure of the paper's belongs to it.
    Kind: approximate, a reconstruction and not the paper's method. The weights stay as they are.
    Skips or precomputes: the exact score, the exponential and the value row of each key whose
        predicted score is too low. Each key's code is made once, when the key enters the cache.
    Offline: nothing.
    Online: x is coded as xc = clip(rint(x / sx), -L, L), with sx = max|x| / L (1 if x = 0) and
        L = 2^(b-1) - 1, for each key and each query by itself, after the rotation. The prediction
        p_j = sq sk_j (kc_j . qc) / sqrt(d) is masked, then a key is kept if
        p_j >= max(p) - ln(1/tau), so its predicted weight is at least tau of the largest, and if it
        is among the r = min(n, max(r_min, ceil(rho n))) largest of the n keys that the query sees,
        of equals the earlier. Softmax and values then run over the kept keys alone, with exact
        scores: the prediction only chooses. codes=leading-one: sign(x) 2^floor(log2|x|) stands for
        x, so that hardware adds exponents; b is not used. It keeps the order but not the size of
        scores, so it goes with rho and tau=0.
    Saves: when one token is decoded, S d + 2 r d multiply-adds for each query head in the place of
        2 S d: less if under half of the keys are kept. Hardware would make the S d ones b x b bits;
        NumPy does them in full, so they are counted in full, under
        attend.selector. Of the cache,
        S (d + 4) bytes are read for each key head (codes, float32 scales) and 8 r d for each query
        head, in the place of 8 S d for each key head: heads that share keys fetch their own. The
        cache grows by d + 4 bytes a key and head (4 d + 4 with leading-one). A prompt saves
        nothing: for many rows the product of all is faster than gathering, so 3 S d are done, and
        only "keys kept" of "keys seen" says what hardware could skip. Coding, rescaling and sorting
        take a few operations per number and are not counted.
    Neutral: tau=0 with rho=1 keeps every key; nothing is predicted then, so any b is exact.
    Not for: wall time in NumPy. The predicting product is as long as the exact one, and choosing
        reads the scores several times more: slower than dense at every context that was tried (up
        to 4,000 keys). Vectors with one outlying coordinate at b=2: it takes all of the scale, and
        the others are coded as 0.
    """
    _check(b, tau, rho, r_min, codes)
    code = IntegerCode(b) if codes == "integer" else LeadingOne()
    keep = Keep(tau, rho, r_min)
    return swap(
        lm,
        Attend,
        lambda dense: SparseAttention(PredictedKeys(Predict(code), keep, dense.scale), dense.scale),
    )


def _check(b, tau, rho, r_min, codes) -> None:
    found = None
    if not 2 <= b <= 8:
        found = f"b={b}; a whole number from 2 to 8 is needed"
    elif not 0 <= tau <= 1:
        found = f"tau={tau:g}; a number from 0 (keep all) to 1 is needed"
    elif not 0 < rho <= 1:
        found = f"rho={rho:g}; a number above 0 and up to 1 (keep all) is needed"
    elif r_min < 1:
        found = f"r_min={r_min}; a whole number of at least 1 is needed"
    elif codes == "leading-one" and tau > 0:
        found = (
            f"tau={tau:g} with codes=leading-one, which foretells the order of the scores but not "
            "their size; give tau=0 and choose by rho"
        )
    if found:
        raise MinitxError(f"predictive_attention has {found}.")


@part
class PredictedKeys(Part):
    """Chooses the keys whose predicted score is high enough."""

    predict: Part
    keep: Part
    scale: float  # 1 / sqrt(d)

    def keeps_all(self, S: int) -> bool:
        return self.keep.tau == 0 and self.keep.rho == 1

    def remember(self, k, layer: Layer):
        """Codes (..., K, S, d) and scales (..., K, S) of all keys so far."""
        return per_key(self, k, self.predict.code, layer)

    def __call__(self, q, k, known, visible: Visible):
        """Masked before anything is ranked, so that no later key has a say in what an earlier query
        keeps."""
        codes, scales = known
        p = self.predict(
            q, codes[..., : visible.S, :], scales[..., : visible.S]
        )  # (..., K, G, T, S)
        p *= self.scale
        return self.keep(visible.hide(p), visible.count)


# Predicting --------------------------------------------------------------------------------------


@part
class Predict(Part):
    """Scores from codes, before the division by sqrt(d). A part, so that its work is counted apart
    from the exact work."""

    code: Part

    def __call__(self, q, kc, sk):
        """q (..., H, T, d), kc (..., K, S, d), sk (..., K, S) -> (..., K, G, T, S)"""
        *lead, H, T, d = q.shape
        K, S = kc.shape[-3], kc.shape[-2]
        ledger.count(q.size * S, cache_bytes=kc.nbytes + sk.nbytes)
        qc, sq = self.code(q)
        qc = qc.reshape(*lead, K, H // K * T, d).astype(q.dtype)
        # Codes are multiplied as floats, since BLAS has no integers. The sums are whole numbers
        # below 2^24 (b = 8: up to d = 1040), so exact in any order: a chunk predicts what single
        # tokens do.
        p = qc @ kc.astype(q.dtype).swapaxes(-1, -2)  # (..., K, G*T, S)
        p *= sk[..., None, :]  # scales differ from key to key, so they matter to the order
        p = p.reshape(*lead, K, H // K, T, S)
        p *= sq.reshape(p.shape[:-1])[..., None]
        return p


@part
class IntegerCode(Part):
    """Each vector as whole numbers of b bits, and a scale of its own."""

    b: int

    def __call__(self, x):
        """x (..., d) -> codes (..., d) int8, scales (...)"""
        code, scale = quantize_symmetric(x, self.b)
        return code.astype(np.int8), scale


@part
class LeadingOne(Part):
    """Each number cut down to the power of two below it; scales are all 1."""

    def __call__(self, x):
        """x (..., d) -> codes (..., d), scales (...), both in the type of x"""
        exponent = np.frexp(x)[1]  # |x| = m 2^exponent with 1/2 <= m < 1
        return np.ldexp(np.sign(x), exponent - 1), np.ones_like(x[..., 0])


# Choosing ----------------------------------------------------------------------------------------


@part
class Keep(Part):
    """Which keys survive: those near the largest, and no more than a share of all."""

    tau: float
    rho: float
    r_min: int

    def __call__(self, p, n):
        """Booleans like p (..., T, S), predictions with MASKED where a key is hidden; n, integers
        that broadcast to (..., T), keys are not. Every row keeps at least one key."""
        t = -math.log(self.tau) if self.tau else math.inf
        kept = p >= p.max(-1, keepdims=True) - t  # relative: an absolute bound may empty a row
        if self.rho == 1:
            return kept
        # a hair less, since 0.07 * 100 = 7.000000000000001 is meant to be 7
        share = np.ceil(self.rho * n - 1e-9).astype(int)
        return kept & top_k(p, np.minimum(n, np.maximum(self.r_min, share)))
