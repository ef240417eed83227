"""``minitx cost slim-attention``: the cost tables of the paper, for a model of any size.

Formulas: arXiv 2503.05840, tables 1 (caches), 2 (one layer, one token) and 7 (Whisper); the paper's
d, e, n are D, H d and the cached tokens S. They count numbers, not bytes, and operations, two per
multiply-add. A token reads the cache once, and its share of the decoder's weights in a batch;
biases, norms and the embedding are left out.
"""

from dataclasses import asdict, dataclass
from typing import Annotated

from minitx.errors import MinitxError
from minitx.lab.layout import table
from minitx.lab.shape import Shape
from minitx.technique import at_least

ENCODERS = True
BATCHES = (1, 64)  # those of table 7


@dataclass(frozen=True)
class Way:
    """One way to cache, in numbers for the whole decoder."""

    name: str
    cache: int
    weights: int

    def reads(self, batch: int) -> float:
        return self.cache + self.weights / batch


@dataclass(frozen=True)
class Step:
    """One layer's self-attention for one token: a row of table 2."""

    name: str
    projection_ops: int
    projection_reads: int
    attention_ops: int
    attention_reads: int

    @property
    def ops_per_read(self) -> float:
        return self.attention_ops / self.attention_reads


@dataclass(frozen=True)
class SlimAttentionCost:
    """Caches, weights and reads per token, with S cached tokens."""

    shape: Shape
    S: int

    @property
    def key_width(self) -> int:
        """H d (paper: e)."""
        return self.shape.heads * self.shape.head_width

    @property
    def aspect(self) -> float:
        """How much wider all keys are than the hidden state (paper: e / d)."""
        return self.key_width / self.shape.width

    @property
    def input_cache_compression(self) -> float:
        """How much smaller a cache of normalized inputs (D wide) is than one of keys and values. It
        fits any kind of heads, but keys have to be made from it in every step."""
        return 2 * self.aspect

    def steps(self) -> list[Step]:
        D, e, S, H = self.shape.width, self.key_width, self.S, self.shape.heads
        slim = 3 * D * e + e * e  # W_kv (e, e) instead of W_v (D, e)
        return [
            Step("vanilla", 8 * D * e, 4 * D * e, 4 * S * e, 2 * S * e),
            Step("slim, values first", 6 * D * e + 2 * S * e * e, slim, 4 * S * e, S * e),
            Step("slim, keys first", 2 * slim, slim, 2 * S * e * (H + 1), S * e),
        ]

    def ways(self) -> list[Way]:
        s, e = self.shape, self.key_width
        D, L = s.width, s.layers
        weights = D * s.vocab_size + L * (4 * D * e + s.ffn_matrices * D * s.hidden * s.experts)
        own = L * (e * e - D * e)  # W_kv instead of W_v
        if not s.encoder_layers:
            cache = e * L * self.S
            return [Way("vanilla", 2 * cache, weights), Way("slim", cache, weights + own)]
        weights += L * 2 * D * e  # W_q and W_o of cross-attention; its keys are made once
        cache, cross = e * L * self.S, e * L * s.source
        return [
            Way("vanilla", 2 * (cache + cross), weights),
            Way("option 1: keys only", cache + cross, weights + own + L * e * e),
            Way("option 2: no cross cache", cache, weights + own + L * 2 * D * e),
        ]

    def speedup(self, way: Way, batch: int) -> float:
        """From fewer reads, if reads are all that takes time."""
        return self.ways()[0].reads(batch) / way.reads(batch)

    def notes(self) -> list[str]:
        s = self.shape
        found = list(s.notes)
        if s.experts > 1:
            found.append("all experts are counted as read")
        if s.encoder_layers:
            found.append(
                "in option 2, which rotary positions rule out, all layers read the encoder's "
                f"output ({s.width * s.source:,} numbers, which the paper does not count)"
            )
        found.append("whether W_k is conditioned well enough only the weights can tell")
        return found

    def as_dict(self) -> dict:
        ways = [
            asdict(way)
            | {f"reads_{batch}": way.reads(batch) for batch in BATCHES}
            | {f"speedup_{batch}": self.speedup(way, batch) for batch in BATCHES}
            for way in self.ways()
        ]
        steps = [asdict(step) | {"ops_per_read": step.ops_per_read} for step in self.steps()]
        found = {"technique": "slim_attention", "shape": asdict(self.shape), "tokens": self.S}
        found |= {"aspect": self.aspect, "input_cache_compression": self.input_cache_compression}
        return found | {"ways": ways, "steps": steps, "notes": self.notes()}

    def __str__(self) -> str:
        return as_text(self)


def cost(
    shape: Shape,
    *,
    tokens: Annotated[int, "cached tokens; 0: as many as the context has", at_least(0)] = 0,
) -> SlimAttentionCost:
    S = tokens or shape.context
    if S < 1:
        raise MinitxError(
            "cost slim_attention: config.json gives no context; give the number of cached tokens "
            "as tokens=NUMBER."
        )
    if shape.kv_heads != shape.heads or shape.heads * shape.head_width < shape.width:
        raise MinitxError(
            "cost slim_attention: expected one key head per query head, and keys at least as wide "
            f"as the hidden state; got {shape.kv_heads} key heads for {shape.heads} query heads, "
            f"{shape.kv_heads * shape.head_width:,} wide, and a hidden state {shape.width:,} wide."
        )
    return SlimAttentionCost(shape, S)


def as_text(c: SlimAttentionCost) -> str:
    layer = [["one layer, one token", "proj. ops", "reads", "attn. ops", "reads", "ops/read"]]
    for s in c.steps():
        numbers = s.projection_ops, s.projection_reads, s.attention_ops, s.attention_reads
        layer.append([s.name, *(f"{n:,}" for n in numbers), f"{s.ops_per_read:g}"])
    heads = [word for batch in BATCHES for word in (f"reads, batch {batch}", "speedup")]
    whole = [["whole decoder", "cache", "smaller", "weights", *heads]]
    first = c.ways()[0]
    for way in c.ways():
        row = [way.name, millions(way.cache), f"{first.cache / way.cache:.1f}x"]
        row.append(millions(way.weights))
        for batch in BATCHES:
            row += [millions(way.reads(batch)), f"{c.speedup(way, batch):.2f}x"]
        whole.append(row)
    return "\n".join(
        [
            *c.shape.heading(c.notes()),
            f"With {c.S:,} cached tokens, in numbers (M: millions):",
            table(whole),
            "",
            table(layer),
            "",
            f"Keys are {c.aspect:g} times as wide as the hidden state: a cache of normalized "
            f"inputs would be {c.input_cache_compression:.2f} times smaller than one of keys "
            "and values.",
        ]
    )


def millions(numbers: float) -> str:
    return f"{numbers / 1e6:,.1f}M"
