"""A small detector beside each block's attention, which foretells its scores from few columns.

After DOTA (Qu et al., 2022): X, what the projections of queries and keys read, is cut down to k
columns by a fixed random projection, Y = X P, and of Y a small matrix for each head makes Q~ and
K~, whose products stand for the scores. Here are the arrays, the file that holds those of a model
(``dota.safetensors``, beside ``model.safetensors``), and the coding in few bits. How they are
learned is in ``minitx.training.detector``, and together with nothing else changed in
``minitx.training.detector_fit``; who keeps which keys by them, in ``minitx.skip.dota``.
"""

from dataclasses import fields
from pathlib import Path

import numpy as np

from minitx import ops
from minitx.checkpoints.common import fingerprint, need_finite
from minitx.checkpoints.safetensors import read_header, read_tensors
from minitx.checkpoints.safetensors_write import write_safetensors
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.model import Attention, NoRope, Rope, split_heads
from minitx.shared.symmetric import quantize_symmetric
from minitx.state import Tokens
from minitx.technique import need
from minitx.tree import Part, part, table

FILE = "dota.safetensors"


@part
class Detector(Part):
    """Of one block. The columns of w_q and w_k go by heads, as those of the model's matrices."""

    p: np.ndarray = table()  # (D, k), drawn once and never trained
    w_q: np.ndarray  # (k, H*k)
    w_k: np.ndarray  # (k, K*k)

    @property
    def k(self) -> int:
        return self.p.shape[1]

    def __call__(self, x, rope: Part, tokens: Tokens):
        """Q~ (..., H, T, k) and K~ (..., K, T, k), rotated, of what the projections read, x
        (..., T, D)."""
        y = ops.linear(x, self.p)  # (..., T, k)
        q, k = (split_heads(ops.linear(y, w), w.shape[1] // self.k) for w in (self.w_q, self.w_k))
        return rope(q, tokens), rope(k, tokens)


def projection(width: int, k: int, rng) -> np.ndarray:
    """P (D, k) of sqrt(3/k) times -1, 0 or +1, with the chances 1/6, 2/3, 1/6 (Achlioptas, 2003): a
    row x keeps its length in the mean over P, E |x P|^2 = |x|^2."""
    signs = rng.choice(3, size=(width, k), p=(1 / 6, 2 / 3, 1 / 6)) - 1
    return (signs * (3 / k) ** 0.5).astype(np.float32)


def random_detectors(config: Config, k: int, seed) -> tuple[Detector, ...]:
    """One for each block, to be trained: W~ so small that Q~ K~^T begins with variance 1 where X
    has, as the scores of a random model do."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(config.layers):
        p = projection(config.width, k, rng)
        w_q, w_k = (
            rng.standard_normal((k, heads * k)).astype(np.float32) * (config.width**-0.5 * k**-0.25)
            for heads in (config.heads, config.kv_heads)
        )
        found.append(Detector(p, w_q, w_k))
    return tuple(found)


def shapes(config: Config, k: int) -> dict[str, tuple]:
    """The arrays of one block, by name."""
    return {"p": (config.width, k), "w_q": (k, config.heads * k), "w_k": (k, config.kv_heads * k)}


def narrow_rope(rope: Part, k: int, width: int) -> Part:
    """The rotation of k columns by angles of the model's own, for heads of ``width`` columns.

    As large a part of the columns turns as in the model, and of its pairs of columns the slowest:
    content that is looked for far away turns little. (Of several choices this one foretold the
    scores of ``stories`` best. The paper's models have no rotation.)
    """
    need(rope, Rope, NoRope)
    if type(rope) is NoRope:
        return rope
    turned = rope.cos.shape[1]
    pairs = turned // 2  # column i turns with column i + pairs, the slower the larger i
    slowest = np.arange(pairs - max(1, round(k * turned / width / 2)), pairs)
    columns = np.concatenate([slowest, slowest + pairs])
    return Rope(rope.cos[:, columns], rope.sin[:, columns])


def need_rank(k: int, config: Config, who: str) -> None:
    """Refuse a k that the rotation cannot turn, or that makes guessing as dear as knowing."""
    if k < 1 or k > config.head_width or k % 2 and config.rope_width:
        even = "an even number" if config.rope_width else "a whole number"
        raise MinitxError(
            f"{who} has k={k}; {even} from {2 if config.rope_width else 1} to the head width, "
            f"{config.head_width}, is needed."
        )


# Few bits ----------------------------------------------------------------------------------------


def coded(x, bits: int | None):
    """As ``quantize_symmetric``; with bits=None x itself, and scales of 1."""
    return (x, np.ones_like(x[..., 0])) if bits is None else quantize_symmetric(x, bits)


def coded_by_head(w, heads: int, bits: int | None):
    """w (k, heads*k) as whole numbers, and one scale for each head's k x k matrix, (heads, 1, 1)"""
    by_head = w.reshape(len(w), heads, -1).swapaxes(0, 1)  # (heads, k, k)
    codes, scale = coded(by_head.reshape(heads, -1), bits)
    codes = codes.reshape(by_head.shape).swapaxes(0, 1)
    return np.ascontiguousarray(codes.reshape(w.shape)), scale[:, None, None]


@part
class Detect(Part):
    """Q~ and K~ in few bits. w_q (k, H*k) and w_k (k, K*k) are whole numbers too, if there are
    bits, to be multiplied by s_q (H, 1, 1) and s_k (K, 1, 1)."""

    p: np.ndarray = table()  # (D, k)
    w_q: np.ndarray
    w_k: np.ndarray
    s_q: np.ndarray
    s_k: np.ndarray
    rope: Part
    bits: int | None

    @staticmethod
    def of(detector: Detector, attn: Attention, width: int, bits: int | None) -> "Detect":
        """For an attention whose heads are ``width`` wide."""
        w_q, s_q = coded_by_head(detector.w_q, attn.heads, bits)
        w_k, s_k = coded_by_head(detector.w_k, attn.kv_heads, bits)
        rope = narrow_rope(attn.rope, detector.k, width)
        return Detect(detector.p, w_q, w_k, s_q, s_k, rope, bits)

    def __call__(self, x, tokens: Tokens):
        """Codes of Q~ (..., H, T, k), and codes (..., K, T, k) and scales (..., K, T) of K~, for
        what the projections read, x (..., T, D). The scale of a query changes no choice."""
        y = self.narrow(x)
        queries, _ = self.rows(y, self.w_q, self.s_q, tokens)
        return queries, self.rows(y, self.w_k, self.s_k, tokens)

    def q(self, x, tokens: Tokens):
        """Codes of Q~ alone."""
        return self.rows(self.narrow(x), self.w_q, self.s_q, tokens)[0]

    def kv(self, x, tokens: Tokens):
        """Codes and scales of K~ alone."""
        return self.rows(self.narrow(x), self.w_k, self.s_k, tokens)

    def narrow(self, x):
        return coded(ops.linear(x, self.p), self.bits)  # (..., T, k), (..., T)

    def rows(self, y, w, s, tokens: Tokens):
        """Scales come last: whole numbers are multiplied, which is exact in any order, so that a
        code that lies halfway between two is rounded alike in a chunk and alone."""
        codes, scale = y
        z = self.rope(split_heads(ops.linear(codes, w), len(s)), tokens)
        codes, own = coded(z, self.bits)
        return codes, own * scale[..., None, :] * s[..., 0]


# The file ----------------------------------------------------------------------------------------


def write_detectors(detectors, folder) -> None:
    """Write ``dota.safetensors`` into the folder, in float32, for the weights that stand there."""
    tensors = {
        f"blocks.{number}.{f.name}": getattr(detector, f.name)
        for number, detector in enumerate(detectors)
        for f in fields(Detector)
    }
    metadata = {"format": "minitx detectors", "weights": weights_beside(folder)}
    write_safetensors(Path(folder) / FILE, tensors, "F32", metadata)


def weights_beside(folder) -> str:
    """The fingerprint of the weights in the folder: of one file, or of its shards."""
    return fingerprint(*sorted(Path(folder).glob("model*.safetensors")))


def read_detectors(folder, config: Config, dtype=np.float32) -> tuple[Detector, ...]:
    """The detectors in the folder, one for each block; MinitxError if the file is missing or
    damaged, if its arrays do not fit a model of this configuration, or if they learned to foretell
    other weights than those that stand there."""
    path = Path(folder) / FILE
    found = read_tensors(path)
    names = [f.name for f in fields(Detector)]
    wanted = [f"blocks.{number}.{name}" for number in range(config.layers) for name in names]
    if missing := [name for name in wanted if name not in found]:
        raise MinitxError(
            f"{path}: has no tensor {missing[0]!a}; the detectors of {config.layers} blocks are "
            "needed, as training with this model's own recipe writes them."
        )
    if unknown := sorted(set(found) - set(wanted)):
        raise MinitxError(
            f"{path}: holds {unknown[0]!a}, which a model of {config.layers} blocks has no use "
            "for; is it another model's?"
        )
    k = found["blocks.0.p"].shape[-1] if found["blocks.0.p"].ndim else 0
    need_rank(k, config, str(path))
    for name in wanted:
        shape = shapes(config, k)[name.rpartition(".")[2]]
        if found[name].shape != shape:
            raise MinitxError(
                f"{path}: {name} has the shape {found[name].shape}, but this model needs {shape}; "
                "is it another model's?"
            )
        need_finite(path, name, found[name])
    if read_header(path).metadata.get("weights") != weights_beside(folder):
        raise MinitxError(
            f"{path}: was not trained with the weights beside it; take both from one training, or "
            "use fit=post-hoc."
        )
    return tuple(
        Detector(*(found[f"blocks.{number}.{name}"].astype(dtype) for name in names))
        for number in range(config.layers)
    )
