"""DOTA: a small trained detector foretells the scores, and only the strongest keys are scored.

Here are the part that runs the detector beside attention, the one that chooses by it, and the count
of key loads when several rows run together. The detector's arrays and its file are in
``minitx.skip.dota.detector``, its training with the model in ``minitx.training.detector``. Not here:
thresholds in the place of a fixed number of keys, and the accelerator's arithmetic in 16 bits.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Literal

import numpy as np

from minitx import ledger
from minitx.errors import MinitxError
from minitx.model import Attend, Attention, LayerNorm, RMSNorm
from minitx.shared.sparse_attention import SparseAttention, Visible, top_k
from minitx.skip.dota.detector import FILE, Detect, Detector, need_rank, read_detectors
from minitx.state import Layer
from minitx.technique import NoSuchPart, need, technique, wrap
from minitx.tree import Part, float_type, part


@technique(
    level="scores",
    exact=False,
    neutral={"kappa": 10**9},
    demo={"kappa": 4},
    event=("keys kept", "keys seen"),
)
def dota(
    lm,
    *,
    fit: Literal["auto", "trained", "post-hoc"] = "auto",
    kappa: int = 16,
    k: int | None = None,
    bits: int | None = 4,
    rows: int = 4,
):
    """A small detector foretells the scores; the kappa strongest keys of each row are scored.

    Paper: Zheng Qu, Liu Liu, Fengbin Tu, Zhaodong Chen, Yufei Ding and Yuan Xie, 2022, "DOTA:
        Detect and Omit Weak Attentions for Scalable Transformer Acceleration", ASPLOS 2022, pp.
        14-26, doi 10.1145/3503222.3507738. Its body was not available: abstract, first page, and
        notes of others. Confirmed there are the projection's form, that W~ multiply X P, that they
        are trained with the model by a squared error, and low precision. Unconfirmed are the
        chances in P, that W~ are k x k, the weight of that error, a number of keys fixed for every
        row, and how the scheduler orders loads.
    Kind: approximate. With fit=trained as in the paper, as far as that is known; fit=post-hoc is a
        substitute chosen here, and worth less: the model has not learned to be foretold.
    Skips or precomputes: the exact score, the exponential and the value row of all but kappa keys
        of each row: of every row the same number, so that all are done at the same time.
    Offline: for each block P in sqrt(3/k) {-1, 0, +1}^(D x k) with the chances 1/6, 2/3, 1/6, drawn
        once and frozen. fit=trained: W~q for each query head and W~k for each key head (k x k),
        learned together with the model by L + weight * mean (S - S~)^2 and read from
        dota.safetensors beside its weights; a stage of a recipe that has "detector": {"k": ...,
        "weight": ...} trains them. fit=post-hoc: least squares on calibration stories, the model
        frozen. Rotary models are not in the paper: here W~q and W~k are then found in turns, a few
        rounds. fit=auto: trained if that file is there. k: the rank, for the post-hoc fit; a
        quarter of the head width unless given. The W~ are coded in few bits (below), one scale for
        the matrix of each head.
    Online: X is what the projections read (after the norm), Y = X P (T, k), Q~ = Y W~q,
        K~ = Y W~k, rotated as q and k are, by the slowest of the model's angles. With bits=b the
        rows of Y, Q~ and K~ are rint(x / s), s = max|x| / (2^(b-1) - 1) of that row alone (chosen
        here: one scale for all would change when keys arrive); bits=None for floats. Row i keeps
        the min(kappa, i+1) keys j <= i of the largest S~_ij = q~_i . k~_j s_j, of equals the
        earlier; softmax and values run over these with exact scores. K~ and s stand in the cache.
        rows=T: the loads of keys are counted, "row by row" and for T rows of a head that run
        together, one key a row and step: what several idle rows want is loaded once, first what
        most of them want. It changes no number; NumPy loads as it likes.
    Saves: when one token is decoded, S k + 2 kappa d multiply-adds for each query head in the place
        of 2 S d, plus D k + k^2 (H + K) for each block: less if k is well under 2 d and kappa well
        under S. Of the cache S (k + 4) bytes for each key head (4 k + 4 with bits=None) and
        8 kappa d for each query head, in the place of 8 S d for each key head; the cache grows by
        the former. Hardware needs additions alone for X P and b bits for the rest; NumPy multiplies
        in full, and is counted so. Of a prompt nothing is saved here: all scores are computed and
        most are cut off, so S k comes on top.
    Neutral: kappa of the context or more keeps every key; nothing is detected then.
    Not for: first_layer, whose table takes the place of the norm that is read here. fit=trained
        with fold_norms, which takes the gains out of that norm. Wall time in NumPy: the detector's
        calls and the choosing take longer than what is left out saves, at every context that was
        tried (one token, up to 8,000 keys); a prompt is slower too.
    """
    _check(kappa, bits, rows)
    trained = _is_trained(lm, fit)
    detectors = _trained(lm, k) if trained else fitted(lm, k)

    def change(attn: Attention, index: int) -> Part:
        need(attn, Attention)
        if type(attn.attend) is not Attend:
            raise NoSuchPart(Attend)
        if trained:
            need(attn.norm, RMSNorm, LayerNorm)
        detect = Detect.of(detectors[index], attn, lm.model.config.head_width, bits)
        chosen = SparseAttention(Strongest(kappa, rows), attn.attend.scale)
        changed = replace(attn, attend=chosen)
        return DetectingAttention(
            attn.norm, detect, changed, kappa, "trained" if trained else "post-hoc"
        )

    return wrap(lm, "attn", change)


def _check(kappa, bits, rows) -> None:
    found = None
    if kappa < 1:
        found = f"kappa={kappa}; a whole number of at least 1 is needed"
    elif bits is not None and not 2 <= bits <= 8:
        found = f"bits={bits}; a whole number from 2 to 8 is needed, or None for floats"
    elif not 1 <= rows <= 8:
        found = f"rows={rows}; a whole number from 1 to 8 is needed"
    if found:
        raise MinitxError(f"dota has {found}.")


# Where the detectors come from -------------------------------------------------------------------


def _is_trained(lm, fit: str) -> bool:
    here = lm.folder is not None and (lm.folder / FILE).exists()
    if fit == "trained" and not here:
        where = "it was not read from a folder" if lm.folder is None else f"{lm.folder} has none"
        raise MinitxError(
            f"dota has fit=trained but the model has no {FILE} ({where}); train it with a stage "
            "that has a detector, or use fit=post-hoc."
        )
    return here and fit != "post-hoc"


def _trained(lm, k: int | None) -> tuple[Detector, ...]:
    found = read_detectors(lm.folder, lm.model.config, float_type(lm.model))
    if k not in (None, found[0].k):
        raise MinitxError(
            f"dota has k={k} but the trained detector has k={found[0].k}; leave k out, or use "
            "fit=post-hoc."
        )
    return found


@lru_cache(maxsize=1)  # a sweep over kappa needs one fit
def fitted(lm, k: int | None) -> tuple[Detector, ...]:
    """Detectors of rank k by least squares, on calibration stories."""
    from minitx.training.calibration import texts_for  # only for this fit
    from minitx.training.detector_fit import TEXTS, fit

    k = max(2, lm.model.config.head_width // 8 * 2) if k is None else k
    need_rank(k, lm.model.config, "dota")
    return fit(lm.model, texts_for("dota", lm, TEXTS, "train it with a detector"), k)


# The detector at work ----------------------------------------------------------------------------


@part
class DetectingAttention(Part):
    """Attention, and beside it a detector that reads what the projections read: it leaves Q~ and K~
    in the layer's memory, for ``Strongest``."""

    needs_all_rows = True
    has_history = True
    norm: Part  # the attention's own
    detect: Part
    attn: Part
    kappa: int
    fit: str  # how the detector was made

    def __call__(self, x, layer: Layer):
        if self.kappa < layer.capacity:
            guess = guess_of(layer)
            queries, keys = self.detect(self.norm(x), layer.tokens)
            guess.ask(queries, layer)
            guess.store(keys, layer)
        return self.attn(x, layer)

    def backfill(self, x, layer: Layer):
        """Store K~ too of tokens x (..., T, D) that skip this layer."""
        if self.kappa < layer.capacity:
            guess_of(layer).store(self.detect.kv(self.norm(x), layer.tokens), layer)
        self.attn.backfill(x, layer)

    def attend_from(self, x, layer: Layer):
        """Attention from tokens x whose keys and values, and K~, are stored already."""
        if self.kappa < layer.capacity:
            guess_of(layer).ask(self.detect.q(self.norm(x), layer.tokens), layer)
        return self.attn.attend_from(x, layer)


class Guess:
    """What the detector of a block left behind: Q~ of the tokens in hand, K~ of all so far."""

    def __init__(self):
        self.queries = self.keys = self.scales = self.positions = None

    def ask(self, queries, layer: Layer) -> None:
        """Leave Q~ (..., H, T, k) of the tokens in hand for ``Strongest``."""
        self.queries, self.positions = queries, layer.tokens.array

    def store(self, keys, layer: Layer) -> None:
        """Write codes (..., K, T, k) and scales (..., K, T) of the tokens in hand."""
        codes, scales = keys
        if not layer.remember:
            self.keys, self.scales = codes, scales
            return
        if self.keys is None:
            *heads, _, k = codes.shape
            kind = np.int8 if np.array_equal(codes, codes.astype(np.int8)) else codes.dtype
            self.keys = np.empty((*heads, layer.capacity, k), kind)
            self.scales = np.empty((*heads, layer.capacity), scales.dtype)
        where = layer.tokens.positions
        self.keys[..., where, :] = codes
        self.scales[..., where] = scales

    def rewind(self, position: int) -> None:
        """The layer's rows say which entries mean anything: later ones are overwritten."""


def guess_of(layer: Layer) -> Guess:
    return layer.memory.recall(Guess, Guess)


# Choosing ----------------------------------------------------------------------------------------


@part
class Strongest(Part):
    """Chooses the kappa keys of each query with the largest S~."""

    kappa: int
    rows: int  # that run together, in the count of loads

    def keeps_all(self, S: int) -> bool:
        return self.kappa >= S

    def remember(self, k, layer: Layer):
        """Codes of Q~ of the tokens in hand and their positions, codes and scales of K~ of all."""
        guess, S = guess_of(layer), k.shape[-2]
        return guess.queries, guess.positions, guess.keys[..., :S, :], guess.scales[..., :S]

    def __call__(self, q, k, known, visible: Visible):
        """Masked before the largest are taken, so that no later key takes a place."""
        queries, positions, keys, scales = known
        first = int(np.searchsorted(positions, visible.own[0]))  # of the block that is asked about
        queries = queries[..., first : first + visible.T, :]
        p = guessed(queries, keys[..., : visible.S, :], scales[..., : visible.S])
        kept = top_k(visible.hide(p), np.minimum(self.kappa, visible.count))
        ledger.event("key loads, row by row", kept)
        ledger.event(f"key loads, {self.rows} rows together", lambda: loads(kept, self.rows))
        return kept


def guessed(queries, keys, scales):
    """S~ (..., K, G, T, S) of queries (..., H, T, k), keys (..., K, S, k), scales (..., K, S)."""
    *lead, H, T, k = queries.shape
    K, S = keys.shape[-3], keys.shape[-2]
    ledger.count(queries.size * S, cache_bytes=keys.nbytes + scales.nbytes)
    # Codes are multiplied as floats, since BLAS has no integers; sums of them are exact.
    p = queries.reshape(*lead, K, -1, k) @ keys.astype(queries.dtype).swapaxes(-1, -2)
    p *= scales[..., None, :]  # codes of different keys are not comparable
    return p.reshape(*lead, K, H // K, T, S)


def loads(kept, rows: int) -> int:
    """How many keys are loaded for kept (..., T, S), booleans, if so many neighbouring rows of a
    head run together: in each step every row takes one key that it still wants, and of these that
    comes first which most rows without one want, of equals the earlier."""
    *_, T, S = kept.shape
    kept = kept.reshape(-1, T, S)
    if T == 1:
        return kept.sum()
    bit = np.uint8(1) << (np.arange(T, dtype=np.uint8) % rows)
    # Which rows of its group want a key is one number: bits, and not an axis, to be quick.
    wanted = np.add.reduceat(kept * bit[:, None], np.arange(0, T, rows), axis=1, dtype=np.uint8)
    wanted = wanted.reshape(-1, S)  # (groups, S)
    group, count = np.arange(len(wanted)), 0
    while wanted.any():  # a step; at most kappa of them, for all groups and heads side by side
        idle = np.bitwise_or.reduce(wanted, axis=1)
        while idle.any():  # a load; at most ``rows`` of them
            key = np.bitwise_count(wanted & idle[:, None]).argmax(1)
            served = wanted[group, key] & idle
            count += np.count_nonzero(served)
            wanted[group, key] ^= served
            idle ^= served
    return count
