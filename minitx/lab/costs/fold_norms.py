"""``minitx cost fold-norms``: what weightless norms save, and what a deferred division would.

Formulas: FlashNorm, arXiv 2407.09577 (paper: n, k, f, h are D, the outputs of a product, F, H).
Folding a gain saves D weights, and D multiplications per token; folding a bias D weights and D
additions. Dividing by the rms after a product instead of before it (which fold_norms leaves out)
takes one division per output instead of D; deferred further, or merged into other factors, fewer.

Two more of the paper's figures, 21 cycles overlapped and 17 for FlashNorm, follow from no rule that
we know and are not computed.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from minitx.lab.block_matrices import block_weights, embedding_weights
from minitx.lab.layout import table
from minitx.lab.shape import KINDS, Shape
from minitx.technique import at_least

RMS = ("t5", "mt5", "umt5")  # without a gate or with one, RMSNorm
ONE_NORM = ("gptj", "phi", "codegen", "cohere")  # attention and FFN of a block share one
VECTORS = {"olmo": 0, "cohere": 1}  # LayerNorms without gain and bias, or without bias


@dataclass(frozen=True)
class FoldNormsCost:
    """What folding saves on one model. ``rms``: its norms have gains and no biases."""

    shape: Shape
    rms: bool
    vector_width: int  # numbers that a vector unit takes per cycle; a matrix unit takes the square

    @property
    def norms(self) -> int:
        """Norms that are read by matrices: those of the blocks, and the last one before an untied
        head."""
        s = self.shape
        block = 1 if s.kind in ONE_NORM else 2
        return block * s.layers + (0 if s.tied else 1)

    @property
    def vectors(self) -> int:
        """Vectors of D weights in a norm: gain, bias."""
        return VECTORS.get(self.shape.kind, 1 if self.rms else 2)

    @property
    def weights(self) -> int:
        """Weights saved."""
        return self.norms * self.vectors * self.shape.width

    @property
    def relative(self) -> float:
        """The share of all weights; norms are counted, other biases are not."""
        s = self.shape
        last = self.vectors * s.width if s.tied else 0  # the tied one stays
        return self.weights / (block_weights(s) + embedding_weights(s) + self.weights + last)

    @property
    def multiplications(self) -> int:
        """Multiplications by gains saved, per token."""
        return self.norms * self.shape.width if self.vectors else 0

    @property
    def additions(self) -> int:
        """Additions of norms' biases saved, per token, if the matrices have biases already."""
        return self.norms * self.shape.width if self.vectors == 2 else 0

    @property
    def new_biases(self) -> int:
        """Biases that matrices without any get from the norms' biases."""
        s = self.shape
        if self.vectors < 2:
            return 0
        ffn = (s.ffn_matrices - 1) * s.hidden * s.experts
        return s.layers * (self.projections + ffn) + (0 if s.tied else s.vocab_size)

    @property
    def projections(self) -> int:
        """Outputs of W_q, W_k and W_v together."""
        return self.shape.qkv_width

    @property
    def rope(self) -> int:
        """Multiplications saved per block if 1 / rms is merged into the rotary tables (d numbers
        each) instead of all queries and keys."""
        s = self.shape
        return (s.heads + s.kv_heads) * s.head_width - s.head_width

    @property
    def glu(self) -> int:
        """Multiplications saved per block if the branch without the activation is scaled after
        W_down: D instead of F. Negative where that is more."""
        return self.shape.hidden - self.shape.width if self.gated else 0

    @property
    def bilinear(self) -> int:
        """The same where both branches can wait (bilinear, ReGLU): D instead of 2 F."""
        return 2 * self.shape.hidden - self.shape.width if self.gated else 0

    @property
    def gated(self) -> bool:
        return self.shape.ffn_matrices == 3

    @property
    def wait(self) -> int:
        """Cycles before the product can start: the vector unit reads D numbers for the rms, then
        scales them."""
        return 2 * -(-self.shape.width // self.vector_width)

    @property
    def product(self) -> int:
        """Cycles of a product D x D in the matrix unit."""
        return (-(-self.shape.width // self.vector_width)) ** 2

    def notes(self) -> list[str]:
        found = list(self.shape.notes)
        if self.shape.tied:
            found.append("the last norm stays: its gain would go into the embedding too")
        if self.shape.kind == "gemma2":
            found.append("norms after attention and FFN stay, and are not counted")
        if self.shape.kind == "qwen3":
            found.append("norms of queries and keys stay, and are not counted")
        if self.shape.kind == "bloom":
            found.append("the norm after the embedding stays, and is not counted")
        return found

    def as_dict(self) -> dict:
        names = ("norms", "vectors", "weights", "relative", "multiplications", "additions")
        names += ("new_biases", "projections", "rope", "glu", "bilinear", "wait", "product")
        found = {"technique": "fold_norms", "shape": asdict(self.shape), "rms": self.rms}
        found |= {"vector_width": self.vector_width} | {name: getattr(self, name) for name in names}
        return found | {"sequential": self.wait + self.product, "notes": self.notes()}

    def __str__(self) -> str:
        s = self.shape
        folding = [
            ["folding", "numbers"],
            ["norms folded", f"{self.norms:,}"],
            ["weights saved", f"{self.weights:,}"],
            ["share of all weights", f"{self.relative:.3%}"],
            ["multiplications saved per token", f"{self.multiplications:,}"],
            ["additions saved per token", f"{self.additions:,}"],
            ["biases that matrices may gain", f"{self.new_biases:,}"],
        ]
        later = [
            ["deferred division (not done here), per block and token", "multiplications"],
            ["after W_q, W_k, W_v: more", f"{self.projections - s.width:,}"],
            ["1 / rms in cos and sin: saved", f"{self.rope:,}"],
        ]
        if self.gated:
            later += [
                ["one branch after W_down: saved", f"{self.glu:,}"],
                ["both branches (bilinear, ReGLU): saved", f"{self.bilinear:,}"],
            ]
        m = self.vector_width
        cycles = (
            f"A vector unit of {m} and a matrix unit of {m} x {m} take {self.wait} cycles for the "
            f"norm, then {self.product} for a product {s.width:,} x {s.width:,}: "
            f"{self.wait + self.product}. A deferred division hides the first {self.wait}."
        )
        lines = [*s.heading(self.notes()), table(folding), "", table(later), "", cycles]
        return "\n".join(lines)


def cost(
    shape: Shape,
    *,
    norm: Annotated[
        Literal["known", "rms", "layer"],
        "kind of the model's norms; known: as its model_type tells",
    ] = "known",
    vector_width: Annotated[
        int, "width of the vector unit in the paper's timing example; paper: m", at_least(1)
    ] = 128,
) -> FoldNormsCost:
    gated = KINDS[shape.kind].gated if shape.kind in KINDS else shape.ffn_matrices == 3
    known = shape.kind in RMS or gated and shape.kind not in VECTORS
    return FoldNormsCost(shape, known if norm == "known" else norm == "rms", vector_width)
