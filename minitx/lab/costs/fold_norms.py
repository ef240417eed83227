"""``minitx cost fold-norms``: what weightless norms take away, and what dividing later would.

Formulas: FlashNorm, arXiv 2407.09577. A gain that is folded is n weights and n multiplications a
token less, a folded bias n weights and n additions. Dividing by the rms after the product instead
of before it (which fold_norms leaves out) takes k divisions in the place of n, since a product
(n, k) has k results; where it can wait longer, or is merged into other factors, it takes fewer.

Two more of the paper's figures, 21 cycles overlapped and 17 for FlashNorm, follow from no rule that
is known here and are not computed.
"""

from dataclasses import asdict, dataclass
from typing import Literal

from minitx.errors import MinitxError
from minitx.lab.block_matrices import block_weights, embedding_weights
from minitx.lab.evaluate import table
from minitx.lab.shape import KINDS, Shape

RMS = ("t5",)  # without a gate, yet with RMSNorm
ONE_NORM = ("gptj", "phi", "codegen", "cohere")  # attention and FFN of a block share one
VECTORS = {"olmo": 0, "cohere": 1}  # LayerNorms without gain and bias, or without bias


@dataclass(frozen=True)
class FoldNormsCost:
    """What folding saves on one model. ``rms``: its norms have gains alone, no biases."""

    shape: Shape
    rms: bool
    m: int  # numbers that a vector unit takes at a time; a matrix unit takes m * m

    @property
    def norms(self) -> int:
        """Norms whose readers are matrices: those of the blocks, and the last before a head of its
        own."""
        s = self.shape
        block = 1 if s.kind in ONE_NORM else 2
        return block * s.layers + (0 if s.tied else 1)

    @property
    def vectors(self) -> int:
        """Vectors of n = D weights in a norm: gain, bias."""
        return VECTORS.get(self.shape.kind, 1 if self.rms else 2)

    @property
    def weights(self) -> int:
        """Weights that go."""
        return self.norms * self.vectors * self.shape.width

    @property
    def relative(self) -> float:
        """Of all weights, norms counted and other biases left out."""
        s = self.shape
        last = self.vectors * s.width if s.tied else 0  # the tied one stays
        return self.weights / (block_weights(s) + embedding_weights(s) + self.weights + last)

    @property
    def multiplications(self) -> int:
        """Of gains, a token less."""
        return self.norms * self.shape.width if self.vectors else 0

    @property
    def additions(self) -> int:
        """Of norms' biases, a token less, if the matrices have biases already."""
        return self.norms * self.shape.width if self.vectors == 2 else 0

    @property
    def new_biases(self) -> int:
        """Biases that the matrices get where they have none; with biases in the norms alone."""
        s = self.shape
        if self.vectors < 2:
            return 0
        ffn = (s.ffn_matrices - 1) * s.hidden * s.experts
        return s.layers * (self.projections + ffn) + (0 if s.tied else s.vocab_size)

    @property
    def projections(self) -> int:
        """k of queries, keys and values together."""
        return self.shape.qkv_width

    @property
    def rope(self) -> int:
        """Multiplications saved in a block if 1 / rms goes into the tables of cos and sin, d each,
        instead of into all queries and keys."""
        s = self.shape
        return (s.heads + s.kv_heads) * s.head_width - s.head_width

    @property
    def glu(self) -> int:
        """Multiplications saved in a block if the branch without the activation is scaled behind
        the last matrix: n in the place of f. Negative where that is more."""
        return self.shape.hidden - self.shape.width if self.gated else 0

    @property
    def bilinear(self) -> int:
        """The same where both branches can wait (bilinear, ReGLU): n in the place of 2 f."""
        return 2 * self.shape.hidden - self.shape.width if self.gated else 0

    @property
    def gated(self) -> bool:
        return self.shape.ffn_matrices == 3

    @property
    def wait(self) -> int:
        """Cycles until the product can begin: the vector unit reads n numbers for the rms, and
        scales them."""
        return 2 * -(-self.shape.width // self.m)

    @property
    def product(self) -> int:
        """Cycles of a product n x n in the matrix unit."""
        return (-(-self.shape.width // self.m)) ** 2

    def notes(self) -> list[str]:
        found = list(self.shape.notes)
        if self.shape.tied:
            found.append("the last norm stays: its gain would go into the embedding too")
        if self.shape.kind == "gemma2":
            found.append("norms behind attention and FFN stay, and are not counted")
        if self.shape.kind == "qwen3":
            found.append("norms of queries and keys stay, and are not counted")
        if self.shape.kind == "bloom":
            found.append("the norm behind the embedding stays, and is not counted")
        return found

    def as_dict(self) -> dict:
        names = ("norms", "vectors", "weights", "relative", "multiplications", "additions")
        names += ("new_biases", "projections", "rope", "glu", "bilinear", "wait", "product")
        found = {"technique": "fold_norms", "shape": asdict(self.shape), "rms": self.rms}
        found |= {"m": self.m} | {name: getattr(self, name) for name in names}
        return found | {"sequential": self.wait + self.product, "notes": self.notes()}

    def __str__(self) -> str:
        s = self.shape
        folding = [
            ["folding", "numbers"],
            ["norms folded", f"{self.norms:,}"],
            ["weights less", f"{self.weights:,}"],
            ["of all weights", f"{self.relative:.3%}"],
            ["multiplications less, a token", f"{self.multiplications:,}"],
            ["additions less, a token", f"{self.additions:,}"],
            ["biases that matrices may get", f"{self.new_biases:,}"],
        ]
        later = [
            ["dividing later, not done here: a block and token", "multiplications"],
            ["behind W_q, W_k, W_v, more", f"{self.projections - s.width:,}"],
            ["with 1 / rms in cos and sin, less", f"{self.rope:,}"],
        ]
        if self.gated:
            later += [
                ["one branch behind W_down, less", f"{self.glu:,}"],
                ["both branches (bilinear, ReGLU), less", f"{self.bilinear:,}"],
            ]
        cycles = (
            f"A vector unit of {self.m} and a matrix unit of {self.m} x {self.m} take {self.wait} "
            f"cycles for the norm, then {self.product} for a product {s.width:,} x {s.width:,}: "
            f"{self.wait + self.product}, of which dividing later hides the wait."
        )
        lines = [*s.heading(self.notes()), table(folding), "", table(later), "", cycles]
        return "\n".join(lines)


def cost(
    shape: Shape, *, norm: Literal["known", "rms", "layer"] = "known", m: int = 128
) -> FoldNormsCost:
    """norm: which kind the model has, where its model_type does not tell rightly; m: width of the
    vector unit in the paper's example of timing."""
    if m < 1:
        raise MinitxError(f"cost fold_norms needs a vector unit of at least 1 number, not {m}.")
    gated = KINDS[shape.kind].gated if shape.kind in KINDS else shape.ffn_matrices == 3
    known = shape.kind in RMS or gated and shape.kind not in VECTORS
    return FoldNormsCost(shape, known if norm == "known" else norm == "rms", m)
