"""``minitx cost slim-attention``: the cost tables of the paper on slim attention, for any model.

Formulas: arXiv 2503.05840, tables 1 (caches), 2 (one layer, one token) and 7 (Whisper). They count
numbers, not bytes, and operations, two of which are a multiply-add. What a token reads is the cache
once, and the decoder's weights shared by the batch: without biases, norms and the input's table.
"""

from dataclasses import asdict, dataclass

from minitx.errors import MinitxError
from minitx.lab.evaluate import table
from minitx.lab.shape import Shape

ENCODERS = True
BATCHES = (1, 64)  # those of table 7


@dataclass(frozen=True)
class Way:
    """One way to keep what attention needs, in numbers for the whole decoder."""

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
    """Caches, weights and what a token reads, with n tokens in the cache."""

    shape: Shape
    n: int

    @property
    def key_width(self) -> int:
        """e = H d."""
        return self.shape.heads * self.shape.head_width

    @property
    def aspect(self) -> float:
        """e / d of the paper: how much wider keys are than the stream."""
        return self.key_width / self.shape.width

    @property
    def stream_compression(self) -> float:
        """How much smaller a cache of the stream (normalised, D wide) is than one of keys and
        values. It serves heads of any kind, but keys have to be made of it in each step."""
        return 2 * self.aspect

    def steps(self) -> list[Step]:
        D, e, n, h = self.shape.width, self.key_width, self.n, self.shape.heads
        slim = 3 * D * e + e * e  # W_KV (e, e) in the place of W_V (D, e)
        return [
            Step("vanilla", 8 * D * e, 4 * D * e, 4 * n * e, 2 * n * e),
            Step("slim, V rebuilt", 6 * D * e + 2 * n * e * e, slim, 4 * n * e, n * e),
            Step("slim, optimised", 2 * slim, slim, 2 * n * e * (h + 1), n * e),
        ]

    def ways(self) -> list[Way]:
        s, e = self.shape, self.key_width
        D, L = s.width, s.layers
        weights = D * s.vocab_size + L * (4 * D * e + s.ffn_matrices * D * s.hidden * s.experts)
        own = L * (e * e - D * e)  # W_KV for W_V
        if not s.encoder_layers:
            cache = e * L * self.n
            return [Way("vanilla", 2 * cache, weights), Way("slim", cache, weights + own)]
        weights += L * 2 * D * e  # W_Q and W_O of cross-attention: its keys are made once
        cache, cross = e * L * self.n, e * L * s.source
        return [
            Way("vanilla", 2 * (cache + cross), weights),
            Way("option 1: keys alone", cache + cross, weights + own + L * e * e),
            Way("option 2: no cross cache", cache, weights + own + L * 2 * D * e),
        ]

    def speedup(self, way: Way, batch: int) -> float:
        """By reading less, where reading is all that takes time."""
        return self.ways()[0].reads(batch) / way.reads(batch)

    def notes(self) -> list[str]:
        s = self.shape
        found = list(s.notes)
        if s.experts > 1:
            found.append("all experts are counted as read")
        if s.encoder_layers:
            found.append(
                "in option 2, which rotary positions rule out, all layers read the encoder's "
                f"output itself ({s.width * s.source:,} numbers, which the paper does not count)"
            )
        found.append("whether W_K can be inverted well enough only the weights can tell")
        return found

    def as_dict(self) -> dict:
        ways = [
            asdict(way)
            | {f"reads_{batch}": way.reads(batch) for batch in BATCHES}
            | {f"speedup_{batch}": self.speedup(way, batch) for batch in BATCHES}
            for way in self.ways()
        ]
        steps = [asdict(step) | {"ops_per_read": step.ops_per_read} for step in self.steps()]
        found = {"technique": "slim_attention", "shape": asdict(self.shape), "tokens": self.n}
        found |= {"aspect": self.aspect, "stream_compression": self.stream_compression}
        return found | {"ways": ways, "steps": steps, "notes": self.notes()}

    def __str__(self) -> str:
        return as_text(self)


def cost(shape: Shape, *, tokens: int = 0) -> SlimAttentionCost:
    """With that many tokens in the cache; 0: as many as the context has."""
    n = tokens or shape.context
    if n < 1:
        raise MinitxError(
            f"cost slim_attention: {n} tokens in the cache; give at least 1, as tokens=NUMBER."
        )
    if shape.kv_heads != shape.heads or shape.heads * shape.head_width < shape.width:
        raise MinitxError(
            "cost slim_attention: values can be made from keys that are as many as the queries and "
            f"at least as wide as the stream; this model has {shape.kv_heads} heads of keys for "
            f"{shape.heads} query heads, {shape.kv_heads * shape.head_width:,} wide, and a stream "
            f"of {shape.width:,}."
        )
    return SlimAttentionCost(shape, n)


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
            f"With {c.n:,} tokens in the cache, in numbers (M: millions):",
            table(whole),
            "",
            table(layer),
            "",
            f"Keys are {c.aspect:g} times as wide as the stream: a cache of the stream itself "
            f"would be {c.stream_compression:.2f} times smaller than one of keys and values.",
        ]
    )


def millions(numbers: float) -> str:
    return f"{numbers / 1e6:,.1f}M"
