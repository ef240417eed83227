"""llama2.c, literal version: checkpoint writers for every version, and the forward pass.

The forward pass uses Python lists in float64, one token at a time, and rotates adjacent columns as
in the original. It shares no code with minitx.
"""

import math
import struct

import numpy as np

NAMES = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
LAYER_MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
SHAPES = {
    "grouped": (24, 20, 2, 4, 2, 28, 16),
    "plain": (12, 16, 2, 2, 2, 20, 16),
    "multi-query": (16, 8, 1, 4, 1, 12, 16),
}
GROUP = 4


# ----------------------------------------------------------------------------- checkpoint writers


def make_weights(sizes, tied: bool, seed: int = 0) -> dict:
    """Random float32 weights by llama2.c's names; matrices are (out, in)."""
    dim, hidden, layers, heads, kv_heads, vocab, _ = sizes
    kv_dim = dim // heads * kv_heads
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return (rng.standard_normal(shape) * 0.4).astype(np.float32)

    w = {
        "emb": draw(vocab, dim),
        "rms_att": 1 + draw(layers, dim),
        "rms_ffn": 1 + draw(layers, dim),
        "rms_final": 1 + draw(dim),
        "wq": draw(layers, dim, dim),
        "wk": draw(layers, kv_dim, dim),
        "wv": draw(layers, kv_dim, dim),
        "wo": draw(layers, dim, dim),
        "w1": draw(layers, hidden, dim),
        "w2": draw(layers, dim, hidden),
        "w3": draw(layers, hidden, dim),
    }
    w["cls"] = w["emb"] if tied else draw(vocab, dim)
    return w


def float32_bytes(array) -> bytes:
    return b"".join(struct.pack("<f", v) for v in np.ravel(array))


def write_version_0(w, sizes, tied: bool) -> bytes:
    *first, vocab, seq_len = sizes
    out = struct.pack("<7i", *first, vocab if tied else -vocab, seq_len)
    out += float32_bytes(w["emb"]) + float32_bytes(w["rms_att"])
    for name in ("wq", "wk", "wv", "wo"):
        out += float32_bytes(w[name])
    out += float32_bytes(w["rms_ffn"])
    for name in ("w1", "w2", "w3"):
        out += float32_bytes(w[name])
    out += float32_bytes(w["rms_final"])
    half = sizes[0] // sizes[3] // 2
    for function in (math.cos, math.sin):
        for position in range(seq_len):
            out += float32_bytes(
                [function(position / 10000 ** (2 * i / (2 * half))) for i in range(half)]
            )
    return out if tied else out + float32_bytes(w["cls"])


def write_header(version: int, sizes, tied: bool, more: bytes = b"") -> bytes:
    out = struct.pack("<Ii7iB", 0x616B3432, version, *sizes, tied) + more
    return out + b"\0" * (256 - len(out))


def write_version_1(w, sizes, tied: bool) -> bytes:
    out = write_header(1, sizes, tied)
    out += (
        float32_bytes(w["rms_att"])
        + float32_bytes(w["rms_ffn"])
        + float32_bytes(w["rms_final"])
        + float32_bytes(w["emb"])
    )
    for name in LAYER_MATRICES:
        out += float32_bytes(w[name])
    return out if tied else out + float32_bytes(w["cls"])


def quantize(matrix) -> tuple[bytes, np.ndarray]:
    """(the bytes of one matrix in version 2, the dequantized matrix)."""
    integers, scales, values = b"", b"", []
    flat = [float(v) for v in np.ravel(matrix)]
    for start in range(0, len(flat), GROUP):
        group = flat[start : start + GROUP]
        (scale,) = struct.unpack("<f", struct.pack("<f", max(map(abs, group)) / 127))
        levels = [round(v / scale) for v in group]
        integers += struct.pack(f"<{GROUP}b", *levels)
        scales += struct.pack("<f", scale)
        values += [level * scale for level in levels]
    return integers + scales, np.array(values).reshape(matrix.shape)


def write_version_2(w, sizes, tied: bool) -> bytes:
    """Also replaces the matrices of ``w`` by their dequantized values."""
    out = write_header(2, sizes, tied, struct.pack("<i", GROUP))
    out += float32_bytes(w["rms_att"]) + float32_bytes(w["rms_ffn"]) + float32_bytes(w["rms_final"])
    written, w["emb"] = quantize(w["emb"])
    out += written
    for name in LAYER_MATRICES:
        layers = [quantize(matrix) for matrix in w[name]]
        out += b"".join(written for written, _ in layers)
        w[name] = np.array([values for _, values in layers])
    if tied:
        w["cls"] = w["emb"]
        return out
    written, w["cls"] = quantize(w["cls"])
    return out + written


WRITERS = {0: write_version_0, 1: write_version_1, 2: write_version_2}


# ----------------------------------------------------------------------------------- forward pass


def matmul(matrix, x):
    """matrix (out, in) times x (in,), element by element."""
    return [sum(float(m) * v for m, v in zip(row, x, strict=True)) for row in matrix]


def rmsnorm(x, gain):
    scale = 1 / math.sqrt(sum(v * v for v in x) / len(x) + 1e-5)
    return [float(g) * (scale * v) for g, v in zip(gain, x, strict=True)]


def rope(vector, head_size: int, position: int):
    out = list(vector)
    for i in range(0, len(vector), 2):  # adjacent columns form a pair
        angle = position / 10000 ** ((i % head_size) / head_size)
        a, b = vector[i], vector[i + 1]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


class LiteralLlama2c:
    """The transformer of run.c: one token at a time, the KV cache in lists."""

    def __init__(self, w, sizes):
        self.w, self.sizes = w, sizes
        self.keys = [[] for _ in range(sizes[2])]
        self.values = [[] for _ in range(sizes[2])]

    def __call__(self, token: int):
        dim, _, layers, heads, kv_heads, _, _ = self.sizes
        w, head_size = self.w, dim // heads
        position = len(self.keys[0])
        x = [float(v) for v in w["emb"][token]]
        for layer in range(layers):
            h = rmsnorm(x, w["rms_att"][layer])
            q = rope(matmul(w["wq"][layer], h), head_size, position)
            self.keys[layer].append(rope(matmul(w["wk"][layer], h), head_size, position))
            self.values[layer].append(matmul(w["wv"][layer], h))
            heads_out = []
            for head in range(heads):
                kv = head // (heads // kv_heads) * head_size
                heads_out += self.attend(
                    q[head * head_size : (head + 1) * head_size],
                    [key[kv : kv + head_size] for key in self.keys[layer]],
                    [value[kv : kv + head_size] for value in self.values[layer]],
                )
            x = [a + b for a, b in zip(x, matmul(w["wo"][layer], heads_out), strict=True)]
            h = rmsnorm(x, w["rms_ffn"][layer])
            gate, up = matmul(w["w1"][layer], h), matmul(w["w3"][layer], h)
            h = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
            x = [a + b for a, b in zip(x, matmul(w["w2"][layer], h), strict=True)]
        return matmul(w["cls"], rmsnorm(x, w["rms_final"]))

    @staticmethod
    def attend(q, keys, values):
        scores = [sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(len(q)) for k in keys]
        exps = [math.exp(s - max(scores)) for s in scores]
        return [
            sum(p * value[i] for p, value in zip(exps, values, strict=True)) / sum(exps)
            for i in range(len(q))
        ]
