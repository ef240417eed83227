"""Predict-then-compute attention: cheap scores choose the keys, exact ones weigh them.

After Chen et al. 2022, of which only the abstract is public: a reconstruction, see the card.
Another width of the codes, or another rule for what is kept, is a setting. What related designs do
besides (several rounds of prediction, prediction before q and k exist) is not done here.
"""

import math
from typing import Literal

import numpy as np

from minitx import ledger, ops
from minitx.errors import MinitxError
from minitx.model import Attend
from minitx.state import Layer
from minitx.technique import swap, technique
from minitx.tree import Part, part


@technique(level="scores", exact=False, neutral={"tau": 0.0, "rho": 1.0})
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
        NumPy does them in full, so they are counted in full, under attend.predict. Of the cache,
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
    return swap(lm, Attend, lambda dense: PredictThenAttend(Predict(code), keep, dense.scale))


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
class PredictThenAttend(Part):
    """Attention of each query over the keys whose predicted score is high enough."""

    predict: Part
    keep: Part
    scale: float  # 1 / sqrt(d)

    def __call__(self, q, k, v, layer: Layer):
        if self.keep.tau == 0 and self.keep.rho == 1:
            return ops.attention(q, k, v, self.scale, layer.start)
        T, S = q.shape[-2], k.shape[-2]
        kc, sk = self.coded(k, layer)
        out = np.empty_like(q)
        for a, b, end in ops.causal_blocks(T, S):
            keys = k[..., :end, :], v[..., :end, :], kc[..., :end, :], sk[..., :end]
            out[..., a:b, :] = self.rows(q[..., a:b, :], *keys, layer.start)
        return out  # (..., H, T, d)

    def coded(self, k, layer: Layer):
        """Codes (..., K, S, d) and scales (..., K, S) of all keys so far."""
        code = self.predict.code
        if not layer.remember:
            return code(k)
        return layer.memory.recall(self, CodedKeys).extend(k, code, layer)

    def rows(self, q, k, v, kc, sk, start):
        """T queries over S keys, the T newest last. Masked before anything is ranked, so that no
        later key has a say in what an earlier query keeps."""
        T, S = q.shape[-2], k.shape[-2]
        p = self.predict(q, kc, sk)  # (..., K, G, T, S)
        p *= self.scale
        n = np.array([S])  # keys that each query sees
        hidden = hidden_keys(T, S, start)
        if hidden is not None:
            newest = p[..., S - hidden.shape[-1] :]
            np.copyto(newest, ops.MASKED, where=hidden[..., None, None, :, :])
            n = (S - hidden.sum(-1))[..., None, None, :]  # (1, 1, T); ragged batch: (B, 1, 1, T)
        kept = self.keep(p, n)
        if ledger.active:
            ledger.active.event("keys seen", np.broadcast_to(n, p.shape[:-1]).sum())
            ledger.active.event("keys kept", kept.sum())
        attend = gathered if T == 1 else masked
        return attend(q, k, v, self.scale, kept)


def hidden_keys(T: int, S: int, start):
    """As ``ops.hidden_keys``, but a row of padding sees itself, so that no row is empty."""
    hidden = ops.hidden_keys(T, S, start)
    if start is not None:
        t = np.arange(T)
        hidden[:, t, S - T + t] = False
    return hidden


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
        if ledger.active:
            ledger.active.add(q.size * S, cache_bytes=kc.nbytes + sk.nbytes)
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
    """Each vector as whole numbers of b bits, symmetric around 0, and a scale of its own.

    One scale for all keys would change when a larger key comes, and old codes with it.
    """

    b: int

    def __call__(self, x):
        """x (..., d) -> codes (..., d) int8, scales (...)"""
        largest = 2 ** (self.b - 1) - 1
        scale = abs(x).max(-1) / largest
        scale[scale == 0] = 1
        code = np.rint(x / scale[..., None])
        return code.clip(-largest, largest).astype(np.int8), scale


@part
class LeadingOne(Part):
    """Each number cut down to the power of two below it; scales are all 1."""

    def __call__(self, x):
        """x (..., d) -> codes (..., d), scales (...), both in the type of x"""
        exponent = np.frexp(x)[1]  # |x| = m 2^exponent with 1/2 <= m < 1
        return np.ldexp(np.sign(x), exponent - 1), np.ones_like(x[..., 0])


class CodedKeys:
    """The codes and scales of one block's keys, beside its cache and as long."""

    def __init__(self):
        self.count = 0
        self.codes = self.scales = None

    def extend(self, k, code: Part, layer: Layer):
        """Code the keys of k (..., K, S, d) that are not yet; gives those of all.

        Also keys that came while this block's attention was skipped.
        """
        done, S = self.count, k.shape[-2]
        codes, scales = code(k[..., done:, :])
        if self.codes is None:
            shape = (*k.shape[:-2], layer.capacity)
            self.codes = np.empty((*shape, k.shape[-1]), codes.dtype)
            self.scales = np.empty(shape, scales.dtype)
        self.codes[..., done:S, :], self.scales[..., done:S] = codes, scales
        self.count = S
        return self.codes[..., :S, :], self.scales[..., :S]

    def rewind(self, position: int) -> None:
        self.count = min(self.count, position)


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
        return kept if self.rho == 1 else kept & self.among_largest(p, n)

    def among_largest(self, p, n):
        # a hair less, since 0.07 * 100 = 7.000000000000001 is meant to be 7
        share = np.ceil(self.rho * n - 1e-9)
        r = np.minimum(n, np.maximum(self.r_min, share))
        order = np.argsort(-p, axis=-1, kind="stable")  # of equals the earlier key comes first
        kept = np.empty(p.shape, bool)
        np.put_along_axis(kept, order, np.arange(p.shape[-1]) < r[..., None], -1)
        return kept


# Attending to what is kept -----------------------------------------------------------------------


def gathered(q, k, v, scale, kept):
    """One query a head, q (..., H, 1, d), over its kept keys (..., K, G, 1, S), and nothing else.

    Queries keep different numbers of keys, so all N pairs of a query and a key it keeps stand in
    one list, query by query, and sums run over the stretches of that list.
    """
    kept = kept[..., 0, :]  # (..., K, G, S)
    *head, member, key = np.nonzero(kept)  # each (N,)
    queries = (q * scale).reshape(*kept.shape[:-1], q.shape[-1])[(*head, member)]  # (N, d)
    keys, values = k[(*head, key)], v[(*head, key)]  # (N, d)
    if ledger.active:
        ledger.active.add(keys.size + values.size, cache_bytes=keys.nbytes + values.nbytes)
    lengths = kept.sum(-1).reshape(-1)  # (queries,), none 0
    first = lengths.cumsum() - lengths
    s = np.einsum("nd,nd->n", queries, keys)
    s -= np.repeat(np.maximum.reduceat(s, first), lengths)
    weights = np.exp(s, out=s)
    mixed = np.add.reduceat(weights[:, None] * values, first)  # (queries, d)
    mixed /= np.add.reduceat(weights, first)[:, None]
    return mixed.reshape(q.shape)


def masked(q, k, v, scale, kept):
    """The same for many rows: all scores are computed, and those not kept (..., K, G, T, S) are cut
    off. Each head stands for itself, since heads that share keys do not share what they keep."""
    rows = q.reshape(*kept.shape[:-2], 1, *q.shape[-2:])  # (..., K, G, 1, T, d)
    k, v = k[..., None, None, :, :], v[..., None, None, :, :]  # (..., K, 1, 1, S, d)
    return ops.attend_rows(rows, k, v, scale, ~kept).reshape(q.shape)
