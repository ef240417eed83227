"""``minitx cost absorb-products``: weights, multiply-adds and cache of one matrix instead of two.

Standard algebra (see precompute/absorb_products.py), for one layer and one decoded token, without
biases. With ``latent``, keys and values are made from a shared latent of that width, which is what
is cached, as in latent attention (DeepSeek-V2, arXiv 2405.04434).
"""

from dataclasses import asdict, dataclass
from typing import Annotated

from minitx.errors import MinitxError
from minitx.lab.layout import table
from minitx.lab.shape import Shape
from minitx.technique import at_least


@dataclass(frozen=True)
class Way:
    """One way to compute one layer's attention for one token."""

    name: str
    weights: int
    multiply_adds: int
    cache: int  # numbers per token


@dataclass(frozen=True)
class AbsorbProductsCost:
    """With S cached tokens; latent: its width, or 0 for none."""

    shape: Shape
    S: int
    latent: int

    def ways(self) -> list[Way]:
        s, S = self.shape, self.S
        D, H, K, d = s.width, s.heads, s.kv_heads, s.head_width
        if self.latent:
            return self.latent_ways()
        two = D * (H + K) * d, S * H * d  # weights of a pair; scores, or weighted sums
        one = H * D * D, S * H * D
        return [
            Way("separate", 2 * two[0], 2 * sum(two), 2 * K * d),
            Way("W_q W_k^T in one", two[0] + one[0], sum(two + one), D + K * d),
            Way("W_v W_o in one", two[0] + one[0], sum(two + one), D + K * d),
            Way("both", 2 * one[0], 2 * sum(one), D),
        ]

    def latent_ways(self) -> list[Way]:
        """Keys and values (latent -> K d) are made from the S latents in every step; or each query
        is projected to the latent (D -> d -> latent, or by one matrix), and each weighted sum
        back."""
        s, S, latent = self.shape, self.S, self.latent
        D, H, K, d = s.width, s.heads, s.kv_heads, s.head_width
        up, ends = latent * K * d, D * H * d
        factors, one = 2 * (ends + up), 2 * H * D * latent
        return [
            Way("separate", factors, 2 * (ends + S * up + S * H * d), latent),
            Way(
                "absorbed, in two products",
                factors,
                2 * (ends + H * d * latent + S * H * latent),
                latent,
            ),
            Way("absorbed, in one", one, 2 * (H * D * latent + S * H * latent), latent),
        ]

    @property
    def smaller(self) -> bool:
        """Is the one matrix of a head smaller than its two factors? It is if d > D / 2."""
        width = self.latent or self.shape.width
        return width * self.shape.width < (width + self.shape.width) * self.shape.head_width

    @property
    def pays(self) -> bool:
        """Does any other way take fewer multiply-adds per token than separate matrices?"""
        first, *others = self.ways()
        return min(way.multiply_adds for way in others) < first.multiply_adds

    def notes(self) -> list[str]:
        found = list(self.shape.notes)
        if not self.shape.positions and not self.latent:
            found.append(
                "with rotary positions W_q W_k^T cannot be made one matrix; only W_v W_o can"
            )
        if self.latent:
            found.append("rotated columns stay separate, and are not counted")
        return found

    def as_dict(self) -> dict:
        found = {"technique": "absorb_products", "shape": asdict(self.shape), "tokens": self.S}
        found |= {"latent": self.latent, "smaller": self.smaller, "pays": self.pays}
        return found | {"ways": [asdict(way) for way in self.ways()], "notes": self.notes()}

    def __str__(self) -> str:
        return as_text(self)


def cost(
    shape: Shape,
    *,
    tokens: Annotated[int, "cached tokens; 0: as many as the context has", at_least(0)] = 0,
    latent: Annotated[int, "width of the shared latent; 0: none", at_least(0)] = 0,
) -> AbsorbProductsCost:
    S = tokens or shape.context
    if S < 1:
        raise MinitxError(
            "cost absorb_products: config.json gives no context; give the number of cached tokens "
            "as tokens=NUMBER."
        )
    return AbsorbProductsCost(shape, S, latent)


def as_text(c: AbsorbProductsCost) -> str:
    s = c.shape
    rows = [["one layer", "weights", "", "multiply-adds", "", "cache per token", ""]]
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
            f"For a token that attends to {c.S:,} cached ones:",
            table(rows),
            "",
            f"The one matrix of a head has {width:,} x {s.width:,} numbers, its two factors "
            f"{width:,} x {s.head_width} and {s.head_width} x {s.width:,}: "
            f"{'fewer' if c.smaller else 'more'} in the one.",
            f"Absorbing {'saves' if c.pays else 'costs'} multiply-adds here.",
        ]
    )
