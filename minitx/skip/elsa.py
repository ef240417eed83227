"""ELSA: sign hashes estimate the angle between query and key; only similar keys are scored.

The card and the options; what runs (the estimate, the hash, its projection); what is precomputed
(the projection's factors, the angle bias, the thresholds); notes.
"""

import math
from functools import lru_cache
from typing import Annotated

import numpy as np

from minitx import fast, ledger, ops
from minitx.calibration import calibration_ids
from minitx.errors import MinitxError
from minitx.model import Attend
from minitx.progress import bar
from minitx.shared.break_even import check_selection
from minitx.shared.coarse import coarse_scales
from minitx.shared.shapes_seen import score_shapes
from minitx.shared.sparse_attention import SparseAttention, Visible, per_key
from minitx.state import Layer
from minitx.technique import SEEDS, at_least, between, swap, technique, wrap
from minitx.tree import Part, float_type, part, table


@technique(
    level="scores",
    exact=False,
    neutral={"p": 0.0},
    event=("keys kept", "keys seen"),
    presets={"aggressive": {"p": 2.0}},
)
def elsa(
    lm,
    *,
    p: Annotated[
        float, "degree of approximation: larger keeps fewer keys, 0 keeps all", between(0, 1000)
    ] = 1.1,
    threshold: Annotated[
        float | None, "one threshold t for all heads; nothing is learned, and p has no effect"
    ] = None,
    bits: Annotated[
        int | None, "hash length k; default: the width of a key", between(1, 512)
    ] = None,
    angle_bias: Annotated[
        float | None,
        "subtracted from estimated angles, in radians; default: simulated for d and k",
        between(0, math.pi),
    ] = None,
    stories: Annotated[
        int,
        "calibration stories (with calibrate: passages of the text) to learn thresholds from",
        at_least(1, limit=1000),
    ] = 8,
    min_visible: Annotated[
        int | None,
        "learn only from queries that see at least this many keys: with fewer, p/n is close to 1 "
        "and the sample says little; default: 128, or half of the longest calibration text if that "
        "is less",
        at_least(1),
    ] = None,
    seed: Annotated[int, "of the random projection", SEEDS] = 0,
):
    """Select keys by comparing sign hashes, then score only those.

    Paper:     Ham et al., "ELSA: Hardware-Software Co-design for Efficient, Lightweight
               Self-Attention Mechanism in Neural Networks", ISCA 2021,
               doi 10.1109/ISCA52012.2021.00060.
    Fidelity:  the paper's text, in floats. Causal attention and a growing cache are our extension.
    Kind:      approximate; exact at p=0, which keeps every key (unless threshold is given).
    Idea:      Project two vectors onto k = bits random directions: the share of signs that differ
               estimates the angle between them. A key whose estimated similarity to the query is
               below a threshold, learned for each head, is never scored.
    Offline:   A (bits, d head width): a random matrix, orthogonal if bits = d, the same in all
               layers and heads (built so that A x is cheap: see KroneckerProjection).
               bias: 80th percentile of estimated minus true angle between random vectors.
               t, for each layer and query head, from the dense model on calibration text: a query q
               sees n keys with softmax weights w. Let y be the key with the smallest weight among
               those with w > p/n, or if there are none, the key with the largest weight.
               t = mean over all queries of  q . y / (|q| * max|key|);  p = 0: t = -infinity
    Online:    hash(x) = A x >= 0        the signs of A x (x after RoPE); computed once per key
               angle = max(0, pi/bits * hamming(hash(q), hash(key)) - bias)
               sim   = |key| * cos(angle)
               keep the keys with sim > t * max|key|, or if none, the one with the largest sim;
               exact scores and softmax over those. max|key|: over the keys that q sees.
    Saves:     per decoded token with r of S cached keys kept, if a hash takes c d (c = 10 at d=32):
               c d + S (sim) + 2 r d multiply-adds per query head instead of 2 S d, and (c + 1) d
               per key head for the new key's hash and norm. A prompt saves none: on
               stories of 512 tokens only cache reads fall (0.89x), not all multiply-adds.
    In NumPy:  slower than dense below 4,096 keys: gathering the kept rows costs more than scoring
               fewer keys saves.
    Not for:   models without a tokenizer, unless p=0, threshold or calibrate is given.
    Proof:     tests/skip/test_elsa.py; literal version: tests/skip/literal_elsa.py
    Tutorial:  tutorials/06_which_keys_matter.py
    """
    shapes, dtype = score_shapes(lm.model), float_type(lm.model)
    learned = None
    if threshold is None and p > 0:
        texts = calibration_ids(
            "elsa", lm, stories, "give all heads one threshold, such as threshold=0.3"
        )
        if min_visible is None:
            min_visible = min(128, max(1, max(map(len, texts)) // 2))
        learned = learn_thresholds(lm, p, texts, min_visible)

    def sparse(dense: Attend, index: int) -> Part:
        H, _, d = shapes[id(dense)]
        k = d if bits is None else bits
        bias = simulate_angle_bias(d, k, seed) if angle_bias is None else angle_bias
        same = np.full(H, -math.inf if threshold is None else threshold)
        thresholds = same if learned is None else learned[index]
        hashed = sign_hash(d, k, seed, dtype)  # all layers share its arrays
        cosines = cosine_table(k, bias).astype(dtype)
        selector = HashSelector(hashed, bias, cosines, thresholds.astype(dtype))
        return SparseAttention(selector, dense.scale)

    for H, K, d in set(shapes.values()):
        length = d if bits is None else bits
        hashing = -(-length // d) * sum(factor_sizes(d)) * d  # multiply-adds of one vector
        own_key = (hashing + d) * K / H  # hash and norm, once for the query heads that share it
        fixed, few = hashing + own_key, f"use bits={d} or fewer"
        check_selection("elsa", lm.model.config.context, d, fixed, 1, few)

    def change(attn: Part, index: int) -> Part:
        return swap(attn, Attend, lambda dense: sparse(dense, index))

    return wrap(lm, "attn", change)


# Online: estimate and select ---------------------------------------------------------------------


@part
class HashSelector(Part):
    """Keeps the keys whose estimated similarity to the query exceeds the head's threshold.

    sim estimates q . key / |q|, and the threshold is relative to |q| too: so |q| cancels.
    """

    hash: Part
    angle_bias: float  # only shown: ``cosines`` already contains it
    cosines: np.ndarray = table()  # (k + 1,) cosine of the estimated angle, by Hamming distance
    threshold: np.ndarray = table()  # (H,)

    def keeps_all(self, S: int) -> bool:
        return bool((self.threshold < -1).all())  # no similarity is below -max|key|

    def remember(self, k, layer: Layer):
        """Hashes (..., K, S, W), W words of packed bits, and norms (..., K, S) of all keys so far;
        those of a new key are computed when it enters the cache."""
        return per_key(self, k, self.hash_keys, layer)

    def hash_keys(self, k):
        ledger.count(k.size)
        return self.hash(k), coarse_scales(np.sqrt(np.einsum("...d,...d->...", k, k)))

    def __call__(self, q, k, known, visible: Visible):
        hashes, norms = known[0][..., : visible.S, :], known[1][..., : visible.S]
        sim = visible.hide(self.similarity(q, hashes, norms), -math.inf)  # (..., K, G, T, S)
        threshold = self.threshold.reshape(sim.shape[-4], -1, 1, 1)  # (K, G, 1, 1)
        kept = sim > threshold * largest_visible_norm(norms, visible)
        none = np.nonzero(~kept.any(-1))
        if len(none[0]):
            kept[(*none, sim[none].argmax(-1))] = True  # ties go to the lower index
            ledger.event("queries with no key above threshold", len(none[0]))
        return kept

    def similarity(self, q, hashes, norms):
        """``|key| * cos(angle)`` for queries q (..., H, T, d): (..., K, G, T, S)"""
        *lead, H, T, _ = q.shape
        K, S = norms.shape[-2:]
        q_hashes = self.hash(q).reshape(*lead, K, H // K, T, 1, -1)  # (..., K, G, T, 1, W)
        distance = hamming(q_hashes, hashes[..., None, None, :, :])  # (..., K, G, T, S)
        ledger.count(distance.size, cache_bytes=hashes.nbytes + norms.nbytes)
        ledger.event("bits compared", distance.size * (len(self.cosines) - 1))
        sim = self.cosines.take(distance, mode="clip")  # clip: no bounds check, so faster
        sim *= norms[..., None, None, :]
        return sim


def largest_visible_norm(norms, visible: Visible):
    """max|key| over the keys that each query sees, (..., K, 1, T, 1) from norms (..., K, S); T is 1
    if there is no mask. A later key must not raise an earlier query's threshold."""
    norms = norms[..., None, None, :]  # (..., K, 1, 1, S)
    if visible.mask is not None:
        norms = visible.hide(np.repeat(norms, visible.T, -2), 0)
    return norms.max(-1, keepdims=True)


# Online: hash ------------------------------------------------------------------------------------


@part
class SignHash(Part):
    """k bits for each vector: the signs of its projections onto k directions."""

    bits: int  # k
    projections: tuple  # each onto d directions; ceil(k / d) of them

    def __call__(self, x):
        """x (..., d) -> packed hashes (..., W)"""
        signs = [project(x) >= 0 for project in self.projections]
        signs = signs[0] if len(signs) == 1 else np.concatenate(signs, -1)
        return pack_bits(signs[..., : self.bits])


def pack_bits(bits):
    """Booleans (..., k) -> the same bits in W unsigned integers (..., W), padded with 0 to whole
    bytes. The integers are as wide as fits: uint64 if the bytes are a multiple of 8."""
    packed = np.packbits(bits, -1)
    width = math.gcd(packed.shape[-1], 8)  # 1, 2, 4 or 8 bytes
    return packed.view(f"u{width}")


def hamming(a, b):
    """The number of bits in which packed hashes a and b (..., W) differ: integers (...)."""
    distance = np.bitwise_count(a[..., 0] ^ b[..., 0])  # uint8
    for word in range(1, a.shape[-1]):  # few: one holds up to 64 bits
        distance = distance.astype(np.uint16, copy=False)
        distance += np.bitwise_count(a[..., word] ^ b[..., word])
    return distance


@part
class Factor(Part):
    """A small orthogonal matrix."""

    a: np.ndarray = table()  # (n, n)


@part
class KroneckerProjection(Part):
    """``A x`` with A = kron(A1, kron(A2, ...)), which is orthogonal because its factors are.

    Reshape x to (n1, n2, ...), multiply each axis by its own factor, and flatten: d (n1 + n2 + ...)
    multiply-adds instead of d^2.
    """

    factors: tuple  # of Factor

    def __call__(self, x):
        """x (..., d) -> A x (..., d)"""
        y = x.reshape(-1, x.shape[-1])
        for factor in reversed(self.factors):
            # y's last axis belongs to this factor. Multiply along it and move it to the front: then
            # the axis of the next factor is last. After all factors the order is as at the start.
            y = y.reshape(len(y), -1, len(factor.a))  # (N, d / n, n)
            y = ops.linear(y, factor.a.T).swapaxes(1, 2)  # (N, n, d / n)
        return y.reshape(x.shape)


# Offline: projection -----------------------------------------------------------------------------


def sign_hash(d: int, bits: int, seed: int, dtype=np.float64) -> SignHash:
    """The hash that a seed gives for vectors of width d."""
    projections = tuple(
        KroneckerProjection(tuple(Factor(a) for a in factors))
        for factors in random_factors(d, bits, seed, dtype)
    )
    return SignHash(bits, projections)


@lru_cache(maxsize=8)
def random_factors(d: int, bits: int, seed: int, dtype=np.float64):
    """The factors of each of ceil(bits / d) projections: a tuple of tuples of arrays, the same
    arrays at every call. At most d directions are orthogonal to each other, so more bits take
    several independent projections, and fewer bits the first rows of one."""
    rng = np.random.default_rng(seed)
    return tuple(
        tuple(random_orthogonal(n, rng).astype(dtype) for n in factor_sizes(d))
        for _ in range(-(-bits // d))
    )


def factor_sizes(d: int) -> list[int]:
    """Small integers whose product is d, ascending: its prime factors, with 4 instead of 2 * 2 (as
    many multiplies in one step less). [4, 4, 4] for 64, [2, 4, 4] for 32, [7] for 7."""
    sizes, rest = [], d
    for size in (4, 2, *range(3, d + 1, 2)):
        while rest % size == 0:
            sizes.append(size)
            rest //= size
    return sorted(sizes) or [1]


def random_orthogonal(n: int, rng: np.random.Generator) -> np.ndarray:
    """A matrix (n, n) with orthonormal rows: Gram-Schmidt applied to standard normal rows."""
    q, r = np.linalg.qr(rng.standard_normal((n, n)).T)
    return (q * np.sign(np.diag(r))).T  # Gram-Schmidt leaves the diagonal of r positive


# Offline: angle bias -----------------------------------------------------------------------------

SIMULATED = 1 << 19  # draw SIMULATED // d pairs of vectors; accurate to about 0.003 if k = d


@lru_cache
def simulate_angle_bias(d: int, bits: int, seed: int = 0, percentile: float = 0.8) -> float:
    """The bias in radians: the 80th percentile of ``pi/k * hamming`` minus the true angle, over
    pairs of standard normal vectors. After subtracting it, 80% of the angles are estimated too
    small, so a key is more often kept needlessly than lost."""
    x, y = np.random.default_rng((seed, 1)).standard_normal((2, max(SIMULATED // d, 1), d))
    hash_of = sign_hash(d, bits, seed)
    estimated = math.pi / bits * hamming(hash_of(x), hash_of(y))
    lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    true = np.arccos((np.einsum("nd,nd->n", x, y) / lengths).clip(-1, 1))
    return float(np.quantile(estimated - true, percentile))


def cosine_table(bits: int, bias: float) -> np.ndarray:
    """``cos(max(0, pi/k * distance - bias))`` for each Hamming distance from 0 to k: (k + 1,)."""
    return np.cos(np.maximum(0, math.pi / bits * np.arange(bits + 1) - bias))


# Offline: thresholds -----------------------------------------------------------------------------


def learn_thresholds(lm, p: float, texts, min_visible: int = 1) -> list[np.ndarray]:
    """Thresholds (H,) in float64 for each layer, from the queries and keys of the dense model on
    these texts (lists of ids)."""
    found: list[list[np.ndarray]] = []

    def change(attn: Part, index: int) -> Part:
        found.append([])
        return swap(attn, Attend, lambda dense: SampledAttend(dense, p, min_visible, found[index]))

    model = wrap(lm.model, "attn", change)
    for ids in bar(texts, "elsa: learn thresholds", unit="text", delay=1.0):
        model.hidden(ids)
    if not any(map(np.size, found[0])):
        raise MinitxError(
            f"elsa: min_visible is {min_visible}, but the longest calibration text has "
            f"{max(map(len, texts))} tokens, and no query sees more keys; lower min_visible."
        )
    return [np.concatenate(layer, -1).mean(-1, dtype=np.float64) for layer in found]


@part
class SampledAttend(Part):
    """Dense attention that also records each query's sample for its head's threshold."""

    dense: Part
    p: float
    min_visible: int
    found: list  # arrays (H, queries)

    def __call__(self, q, k, v, layer: Layer):
        T = q.shape[-2]  # a whole text
        for a, b, end in fast.causal_blocks(T, T):
            visible = Visible(b - a, end)
            found = threshold_samples(q[:, a:b], k[:, :end], self.p, self.dense.scale, visible)
            self.found.append(found[:, max(self.min_visible - 1 - a, 0) :])
        return self.dense(q, k, v, layer)


def threshold_samples(q, k, p: float, scale: float, visible: Visible):
    """For each query q (H, T, d) of one text, over the keys k (K, S, d): the largest threshold
    (H, T) that all keys with a softmax weight above p/n still reach, if similarities are exact. If
    no weight is above p/n: the largest threshold that the key with the largest weight reaches."""
    (H, T, d), (K, S, _) = q.shape, k.shape
    w = fast.unnormalized_weights(q, k, scale, visible.mask).reshape(K, H // K, T, S)
    w /= w.sum(-1, keepdims=True)
    relevant = w > p / visible.count[..., None]
    least = np.where(relevant, w, 2).argmin(-1)  # 2: above any weight
    y = np.where(relevant.any(-1), least, w.argmax(-1))  # (K, G, T)
    q = q.reshape(K, H // K, T, d)
    score = np.einsum("kgtd,kgtd->kgt", q, k[np.arange(K)[:, None, None], y])
    norm = largest_visible_norm(np.linalg.norm(k, axis=-1), visible)[..., 0]  # (K, 1, T or 1)
    largest = np.linalg.norm(q, axis=-1) * norm
    return np.divide(score, largest, out=np.zeros_like(score), where=largest > 0).reshape(H, T)


# Notes:
#
# - Norms are rounded to 20 bits (shared/coarse.py), so that keys of one token, which RoPE leaves
#   equally long, stay equally similar where their hashes are equal.
# - Any threshold below -1 keeps every key, like p=0.
# - The paper does not say what happens when no key passes, nor whether samples are averaged by
#   query or by text first. Ours: the most similar key is kept; all queries count alike.
# - A prompt is scored densely and masked, since one product of many rows is faster than gathering.
#   "keys kept" of "keys seen" is what hardware could skip there.
# - Cost in full, of one decoded token with k hash bits: the hash takes c d multiply-adds for each
#   of ceil(k / d) stacked projections, c the sum of its factors' sizes (2 + 4 + 4 at d = 32, whose
#   product is d); a new key's norm d more. Hamming distances are counted as "bits compared" and not
#   as multiply-adds. Cache bytes in float32: S (ceil(k / 8) + 4) per key head for hashes and norms,
#   and 8 r d per query head for the kept rows, instead of 8 S d per key head.
# - The paper's 0.127 rad for d = k = 64 is what ``simulate_angle_bias`` finds there; it is about
#   1 / sqrt(k) elsewhere.
# - Time at d = 32: slower than dense attention at every context tried up to 2,048 keys; at 4,096
#   about equal with a tenth of the keys kept.
