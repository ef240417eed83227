"""DOTA: a small trained detector estimates all scores; only each query's top keys are scored.

This file has the card and the part that runs: estimate, mask, top-k. ``detector.py`` has the
detector itself, ``fit.py`` a least-squares fit of it, ``training/detector.py`` the paper's training
together with the model, ``file.py`` the file of trained detectors, and ``loads.py`` a count of the
accelerator's key loads.
"""

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx import ledger
from minitx.calibration import calibration_ids, remembered
from minitx.errors import MinitxError
from minitx.model import Attend, Attention, LayerNorm, RMSNorm
from minitx.shared.shapes_seen import score_shapes
from minitx.shared.sparse_attention import SparseAttention, Visible, top_k
from minitx.skip.dota.detector import Detector, QuantizedDetector, check_rank
from minitx.skip.dota.file import FILE, read_detectors
from minitx.skip.dota.fit import STORIES, fit_detectors
from minitx.skip.dota.loads import key_loads
from minitx.state import Layer
from minitx.technique import at_least, between, need, technique, wrap
from minitx.tree import Part, float_type, part


@technique(
    level="scores",
    exact=False,
    neutral={"keep": 10**9},
    demo={"keep": 4},
    event=("keys kept", "keys seen"),
    presets={"aggressive": {"keep": 16}},
)
def dota(
    lm,
    *,
    fit: Annotated[
        Literal["auto", "trained", "post-hoc"],
        "source of the detectors: dota.safetensors (trained), a least-squares fit (post-hoc), "
        "or trained if that file exists (auto)",
    ] = "auto",
    keep: Annotated[int, "keys that each query keeps", at_least(1)] = 128,
    rank: Annotated[
        int | None,
        "rank of the detectors of fit=post-hoc; default: a quarter of the head width",
        at_least(1),
    ] = None,
    bits: Annotated[int | None, "bits of the detector's integers; None: floats", between(2, 8)] = 4,
    parallel_queries: Annotated[
        int,
        "only for the event 'key loads' (keys that an accelerator fetches from memory if it runs "
        "this many queries at once and they share a fetch); does not change the result",
        between(1, 8),
    ] = 4,
):
    """Select each query's top-k keys with a small trained detector.

    Paper:     Qu et al., "DOTA: Detect and Omit Weak Attentions for Scalable Transformer
               Acceleration", ASPLOS 2022, doi 10.1145/3503222.3507738.
    Fidelity:  a reconstruction from the abstract, the first page and other people's notes (what is
               unconfirmed: Notes). fit=post-hoc and rotary models are ours.
    Kind:      approximate; exact for a query that sees at most keep keys. No setting pays on the
               shipped models: at 512 tokens, keep=128 reads 0.65x the KV cache and costs 0.12 nats,
               keep=256 costs 0.02 and reads more than dense. The detectors do not rank well.
    Idea:      To rank keys, scores of low rank in few bits will do. A tiny detector learns to
               estimate them while the model learns to have scores that can be estimated.
    Offline:   for each block draw p (D model width, rank): sqrt(3 / rank) times -1, 0 or +1,
               with probabilities 1/6, 2/3, 1/6. Learn w_q for each of H query heads and w_k for
               each of K key heads, both (rank, rank), so that estimate ~ score = q . k / sqrt(d):
               trained:   loss = L_model + weight * mean (score - estimate)^2; the model learns too
               post-hoc:  least squares over all pairs of a query and a visible key in calibration
                          stories: w_q with w_k = I, then w_k, w_q, w_k, w_q in turn (fit.py)
    Online:    x (T tokens, D): the input of the block's own q and k matrices
               y  = x p
               q~ = rotate(y w_q);   k~ = rotate(y w_k)
               rotate: RoPE with the model's lowest rank/2 frequencies (nothing without RoPE)
               y, w_q, w_k and the rotated q~ and k~ are quantized to integers of `bits` bits:
               rint(row / scale), scale = max|row| / (2^(bits-1) - 1) (w_q, w_k: one per head)
               estimate[i, j] = q~_i . k~_j             (paper: S~)
               keep the min(keep, i+1) keys j <= i with the largest estimates;
               exact scores, softmax and weighted sum over those only
    Saves:     S rank + 2 keep d instead of 2 S d multiply-adds per query head and decoded token
               with S cached keys, for D rank + rank^2 (H + K) more per block. Prompts: nothing.
    In NumPy:  slower than dense at every context tried, up to 8,000 keys.
    Not for:   use together with first_layer, whose table replaces the norm that the detector reads,
               or, with fit=trained, with fold_norms, which changes that norm's output.
    Proof:     tests/skip/test_dota.py; literal version: tests/skip/literal_dota.py
    Tutorial:  tutorials/07_four_ways_to_find_keys.py
    """
    trained = use_trained(lm, fit)
    detectors = trained_detectors(lm, rank) if trained else fitted_detectors(lm, rank)
    shapes = score_shapes(lm.model)

    def change(attn: Attention, index: int) -> Part:
        need(attn, Attention)
        need(attn.attend, Attend)
        if trained:
            need(attn.norm, RMSNorm, LayerNorm)
            need_heads(detectors[index], attn, index)
        width = shapes[id(attn.attend)].width
        detector = QuantizedDetector.of(detectors[index], attn, width, bits)
        selector = DetectedKeys(keep, parallel_queries, bits)
        attn = replace(attn, attend=SparseAttention(selector, attn.attend.scale))
        return DetectingAttention(
            attn.norm, detector, attn, keep, "trained" if trained else "post-hoc"
        )

    return wrap(lm, "attn", change)


# Online ------------------------------------------------------------------------------------------


@part
class DetectedKeys(Part):
    """The selector: keeps the keys of each query with the largest estimated scores."""

    keep: int
    parallel_queries: int  # only for the event "key loads"
    bits: int | None = None  # of q~ and k~, for the ledger; None: floats

    def __call__(self, q, k, known, visible: Visible):
        """q~ and k~ come from ``DetectingAttention``; q and k are not read."""
        queries, positions, keys, scales = known
        first = int(
            np.searchsorted(positions, visible.own[0])
        )  # index of the first of these queries
        queries = queries[..., first : first + visible.T, :]
        estimates = estimate(
            queries, keys[..., : visible.S, :], scales[..., : visible.S], self.bits
        )
        kept = top_k(visible.hide(estimates), np.minimum(self.keep, visible.count))
        ledger.event("key loads, one query at a time", kept)
        ledger.event(
            f"key loads, {self.parallel_queries} queries in parallel",
            lambda: key_loads(kept, self.parallel_queries),
        )
        return kept

    def keeps_all(self, S: int) -> bool:
        return self.keep >= S

    def remember(self, k, layer: Layer):
        """q~ of the tokens of this call and their positions; k~ of all tokens so far and its
        scales."""
        cache, S = detector_cache(layer), k.shape[-2]
        return cache.queries, cache.positions, cache.keys[..., :S, :], cache.scales[..., :S]


def estimate(queries, keys, scales, bits=None):
    """q~ . k~ (..., K, G, T, S), G = H / K, for queries (..., H, T, rank), keys (..., K, S, rank)
    and the keys' scales (..., K, S). Without the queries' scales, which do not change the order of
    a query's keys."""
    *lead, H, T, rank = queries.shape
    K, S = keys.shape[-3], keys.shape[-2]
    ledger.count(queries.size * S, cache_bytes=keys.nbytes + scales.nbytes, bits=bits)
    # Integers are multiplied as floats, since BLAS has no integers; their sums are exact.
    estimates = queries.reshape(*lead, K, -1, rank) @ keys.astype(queries.dtype).swapaxes(-1, -2)
    estimates *= scales[..., None, :]  # integers of different keys are not comparable
    return estimates.reshape(*lead, K, H // K, T, S)


@part
class DetectingAttention(Part):
    """Attention with a detector beside it, which reads the input of the q and k matrices, and
    stores q~ and k~ for ``DetectedKeys``."""

    needs_all_rows = True  # needs every token's cache row
    has_history = True  # keeps k~ of all tokens beside the KV cache
    norm: Part  # the attention's own norm
    detector: Part
    attn: Part
    keep: int
    fit: str  # "trained" or "post-hoc"

    def __call__(self, x, layer: Layer):
        if self.keep < layer.capacity:  # otherwise every key is kept, however long the text
            queries, keys = self.detector(self.norm(x), layer.tokens)
            detector_cache(layer).set_queries(queries, layer)
            detector_cache(layer).store_keys(keys, layer)
        return self.attn(x, layer)

    def backfill(self, x, layer: Layer):
        """Store k~ too for tokens x (..., T, D) that skip this layer."""
        if self.keep < layer.capacity:
            keys = self.detector.kv(self.norm(x), layer.tokens)
            detector_cache(layer).store_keys(keys, layer)
        self.attn.backfill(x, layer)

    def attend_from(self, x, layer: Layer):
        """Attention from tokens x whose keys and values, and k~, are stored already."""
        if self.keep < layer.capacity:
            queries = self.detector.q(self.norm(x), layer.tokens)
            detector_cache(layer).set_queries(queries, layer)
        return self.attn.attend_from(x, layer)


class DetectorCache:
    """Beside a layer's KV cache: k~ of all tokens so far, and q~ of the tokens of this call."""

    def __init__(self):
        self.queries = self.positions = self.keys = self.scales = None

    def set_queries(self, queries, layer: Layer) -> None:
        self.queries, self.positions = queries, layer.tokens.array

    def store_keys(self, keys, layer: Layer) -> None:
        """keys: k~ (..., K, T, rank) and scales (..., K, T) of the tokens of this call."""
        integers, scales = keys
        if not layer.remember:  # a single pass: nothing is kept after it
            self.keys, self.scales = integers, scales
            return
        if self.keys is None:
            *heads, _, rank = integers.shape
            fits = np.array_equal(integers, integers.astype(np.int8))  # false with bits=None
            dtype = np.int8 if fits else integers.dtype
            self.keys = np.empty((*heads, layer.capacity, rank), dtype)
            self.scales = np.empty((*heads, layer.capacity), scales.dtype)
        positions = layer.tokens.positions
        self.keys[..., positions, :] = integers
        self.scales[..., positions] = scales

    def rewind(self, position: int) -> None:
        """Nothing to do: entries beyond the cached rows are not read, and overwritten later."""


def detector_cache(layer: Layer) -> DetectorCache:
    return layer.memory.recall(DetectorCache, DetectorCache)


# Offline -----------------------------------------------------------------------------------------


def use_trained(lm, fit: str) -> bool:
    """Whether to read the trained detectors; MinitxError if fit=trained and there are none."""
    exists = lm.folder is not None and (lm.folder / FILE).exists()
    if fit == "trained" and not exists:
        where = "was not read from a folder" if lm.folder is None else f"has none in {lm.folder}"
        raise MinitxError(
            f"dota: fit=trained reads {FILE} beside the weights, and this model {where}; train it "
            "with a stage that has a detector, or use fit=post-hoc."
        )
    return exists and fit != "post-hoc"


def trained_detectors(lm, rank: int | None) -> tuple[Detector, ...]:
    found = read_detectors(lm.folder, lm.model.config, float_type(lm.model))
    if rank not in (None, found[0].rank):
        raise MinitxError(
            f"dota: rank is {rank}, but the trained detectors have the rank {found[0].rank}; leave "
            "rank out, or use fit=post-hoc."
        )
    return found


def need_heads(detector: Detector, attn: Attention, index: int) -> None:
    """Refuse a detector that was trained for more heads than this layer has."""
    trained = detector.w_q.shape[1] // detector.rank, detector.w_k.shape[1] // detector.rank
    if trained != (attn.heads, attn.kv_heads):
        raise MinitxError(
            f"dota's detector of block {index} was trained for {trained[0]} query heads and "
            f"{trained[1]} key heads, and the block has {attn.heads} and {attn.kv_heads} "
            "(head_prune removes heads); use fit=post-hoc."
        )


def fitted_detectors(lm, rank: int | None) -> tuple[Detector, ...]:
    rank = max(2, lm.model.config.head_width // 8 * 2) if rank is None else rank
    check_rank(rank, lm.model.config, "dota: rank")
    texts = calibration_ids("dota", lm, STORIES, "train it with a detector")
    return remembered("dota", lm, texts, (rank,), lambda: fit_detectors(lm.model, texts, rank))


# Notes:
#
# - Confirmed by the abstract, the first page or others' notes: the form of p; that w_q and w_k
#   multiply x p; that they are trained with the model by a squared error; low precision.
#   Unconfirmed: the probabilities in p, that w_q and w_k are rank x rank, the weight of the error,
#   that every query keeps the same number of keys (so that all finish together), and the order of
#   loads. Left out: a threshold on the estimates instead of top-k, with which queries keep
#   different numbers of keys, and the accelerator's 16-bit fixed point.
# - Rotation: detector.py (narrow_rope) for models that rotate only some columns. post-hoc without
#   rotation: one least squares and an SVD (fit.py).
# - A stage of a training recipe with "detector": {"k": rank, "weight": ...} trains detectors, and
#   writes dota.safetensors beside the weights (stories: see its recipe.json).
# - The scales of y are rounded to 20 bits (shared/coarse.py), so that tokens with equal integers
#   have equal estimates, however the model's sums were rounded.
# - A scale for each row is ours: one scale for all keys would change when a larger key arrives, and
#   with it earlier selections. Ties among estimates
#   are common at 2 bits and go to the lower index.
# - The cost is below dense attention's only if rank is well under 2 d and keep well under S. Cache
#   reads per token: S (rank + 4) bytes for each key head (S (4 rank + 4) with bits=None) and
#   8 keep d for each query head, instead of 8 S d for each key head. The cache grows by rank + 4
#   bytes per key and key head.
# - In hardware x p needs no multiplications, and the other products are of ``bits``-bit integers.
#   Here all are float multiplications and counted as such. For a prompt all scores are computed and
#   most are masked, and the estimates come on top.
# - Time: the detector's NumPy calls and the selection take longer than attention over all keys;
#   tried for one token and up to 8,000 keys. A prompt is slower, too.
