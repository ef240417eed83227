"""``minitx cost absorb-products``: one matrix for two, in weights, multiply-adds and cache.

Standard algebra (see precompute/absorb_products.py), for one layer and one token that is decoded.
Biases are left out. ``latent``: as if keys and values were made from a shared latent of that many
numbers, which is what the cache then holds, as in latent attention (DeepSeek-V2, arXiv 2405.04434).
"""

from dataclasses import asdict, dataclass

from minitx.errors import MinitxError
from minitx.lab.evaluate import table
from minitx.lab.shape import Shape


@dataclass(frozen=True)
class Way:
    """One way to do one layer's attention for one token."""

    name: str
    weights: int
    multiply_adds: int
    cache: int  # numbers a token


@dataclass(frozen=True)
class AbsorbProductsCost:
    """With S tokens in the cache; c = latent, or 0."""

    shape: Shape
    S: int
    latent: int

    def ways(self) -> list[Way]:
        s, S = self.shape, self.S
        D, H, K, d = s.width, s.heads, s.kv_heads, s.head_width
        if self.latent:
            return self.latent_ways()
        apart = D * (H + K) * d, S * H * d  # weights of a pair, a score or a mix
        one = H * D * D, S * H * D
        plain = 2 * K * d
        return [
            Way("apart", 2 * apart[0], 2 * sum(apart), plain),
            Way("W_Q W_K^T in one", apart[0] + one[0], sum(apart + one), D + K * d),
            Way("W_V W_O in one", apart[0] + one[0], sum(apart + one), D + K * d),
            Way("both", 2 * one[0], 2 * sum(one), D),
        ]

    def latent_ways(self) -> list[Way]:
        """Keys (c -> K d) and values alike are made of the S latents in each step; or each query
        goes to the latents' width (D -> d -> c, or by one matrix), and each mix back."""
        s, S, c = self.shape, self.S, self.latent
        D, H, K, d = s.width, s.heads, s.kv_heads, s.head_width
        up, ends = c * K * d, D * H * d
        factors, one = 2 * (ends + up), 2 * H * D * c
        return [
            Way("apart", factors, 2 * (ends + S * up + S * H * d), c),
            Way("absorbed, in two products", factors, 2 * (ends + H * d * c + S * H * c), c),
            Way("absorbed, in one", one, 2 * (H * D * c + S * H * c), c),
        ]

    @property
    def smaller(self) -> bool:
        """Is one matrix of a head smaller than its two factors? That is d > D / 2."""
        width = self.latent or self.shape.width
        return width * self.shape.width < (width + self.shape.width) * self.shape.head_width

    @property
    def pays(self) -> bool:
        """Does any other way take fewer multiply-adds a token than keeping all apart?"""
        first, *others = self.ways()
        return min(way.multiply_adds for way in others) < first.multiply_adds

    def notes(self) -> list[str]:
        found = list(self.shape.notes)
        if not self.shape.positions and not self.latent:
            found.append(
                "if positions are rotary, W_Q W_K^T cannot be made one matrix, and of these only "
                "W_V W_O can be used"
            )
        if self.latent:
            found.append("columns that are rotated stay apart, and are not counted")
        return found

    def as_dict(self) -> dict:
        found = {"technique": "absorb_products", "shape": asdict(self.shape), "tokens": self.S}
        found |= {"latent": self.latent, "smaller": self.smaller, "pays": self.pays}
        return found | {"ways": [asdict(way) for way in self.ways()], "notes": self.notes()}

    def __str__(self) -> str:
        return as_text(self)


def cost(shape: Shape, *, tokens: int = 0, latent: int = 0) -> AbsorbProductsCost:
    """For a token on that many in the cache; 0: as many as the context has."""
    S = tokens or shape.context
    if S < 1:
        raise MinitxError(
            f"cost absorb_products: {S} tokens in the cache; give at least 1, as tokens=NUMBER."
        )
    if latent < 0:
        raise MinitxError(f"cost absorb_products: latent is {latent}; it must be at least 0.")
    return AbsorbProductsCost(shape, S, latent)


def as_text(c: AbsorbProductsCost) -> str:
    s = c.shape
    rows = [["one layer", "weights", "", "multiply-adds", "", "cache a token", ""]]
    first = c.ways()[0]
    for way in c.ways():
        row = [way.name]
        for name in ("weights", "multiply_adds", "cache"):
            value = getattr(way, name)
            row += [f"{value:,}", f"{value / getattr(first, name):.2f}x"]
        rows.append(row)
    width = c.latent or s.width
    return "\n".join(
        [
            *s.heading(c.notes()),
            f"For a token on {c.S:,} in the cache:",
            table(rows),
            "",
            f"One matrix of a head has {width:,} x {s.width:,} numbers, its two factors "
            f"{width:,} x {s.head_width} and {s.head_width} x {s.width:,}: "
            f"{'fewer' if c.smaller else 'more'} in one.",
            f"Absorbing {'saves' if c.pays else 'costs'} multiply-adds here.",
        ]
    )
