"""``minitx cost first-layer``: the cost tables of Graef's paper, for a model of any size.

Formulas: arXiv 2402.13388, section 3. They count numbers, not bytes, and leave out biases, norms
and the routers of experts. Beyond the paper: heads that do not fill the width, tied heads, learned
positions (see precompute/first_layer.py), and the number of tokens at which reads break even.
"""

from dataclasses import asdict, dataclass

from minitx.lab.block_matrices import ExampleTable
from minitx.lab.layout import table
from minitx.lab.shape import Shape

BATCHES = (1, 16, 256, 1024)  # those of the paper


@dataclass(frozen=True)
class FirstLayerCost(ExampleTable):
    """Every row of the paper's tables, for one model."""

    @property
    def eliminated(self) -> int:
        """Weights of block 0 that are no longer needed; as many multiply-adds are saved per token
        (with experts: if all of them ran)."""
        ffn = self.shape.parallel and not self.shape.positions  # which keep it out of the table
        return self.qp_weights // 2 + self.kv_weights + (self.ffn_weights if ffn else 0)

    @property
    def extra(self) -> int:
        """Numbers of queries, keys and values in a row, besides the D of s."""
        return self.shape.qkv_width

    @property
    def tables(self) -> int:
        """Rows read per token: one, and with learned positions a second one."""
        return 2 if self.shape.positions else 1

    def reads_without(self, batch: int) -> int:
        """Numbers that block 0 reads for ``batch`` tokens in one pass if it computes."""
        return self.eliminated + batch * self.tables * self.shape.width

    def reads_with(self, batch: int) -> int:
        """The same if it looks up."""
        return batch * self.tables * (self.shape.width + self.extra)

    def factor(self, batch: int) -> float:
        return self.reads_without(batch) / self.reads_with(batch)

    @property
    def break_even(self) -> float:
        """Tokens per pass above which the table reads more than the weights."""
        return self.eliminated / (self.tables * self.extra)

    @property
    def growth(self) -> int:
        """Numbers in the tables beyond those of the embedding. A tied head keeps the embedding."""
        s = self.shape
        return self.extra * (s.vocab_size + s.positions) + (s.width * s.vocab_size if s.tied else 0)

    @property
    def net(self) -> int:
        return self.growth - self.eliminated

    @property
    def relative(self) -> float:
        return self.net / self.total_weights

    def notes(self) -> list[str]:
        """Caveats for a reader of the figures."""
        s = self.shape
        found = list(s.notes)
        if s.parallel and s.positions:
            found.append("learned positions keep the FFN out of the table")
        elif s.parallel and s.experts > 1:
            found.append(
                "all experts are counted as read and run, as in the paper; a router chooses a few, "
                "so the factors of small batches and the multiply-adds are too favorable"
            )
        if s.tied:
            found.append("the tied head keeps the embedding, which is counted as growth")
        return found

    def as_dict(self) -> dict:
        names = ("qp_weights", "kv_weights", "ffn_weights", "embedding_weights", "total_weights")
        names += ("eliminated", "growth", "net", "relative", "break_even")
        reads = [
            {
                "batch": batch,
                "without": self.reads_without(batch),
                "with": self.reads_with(batch),
                "factor": self.factor(batch),
            }
            for batch in BATCHES
        ]
        found = {"technique": "first_layer", "shape": asdict(self.shape)}
        found |= {name: getattr(self, name) for name in names} | {"reads": reads}
        return found | {"upper_bound": 1 / self.shape.layers, "notes": self.notes()}

    def __str__(self) -> str:
        return as_text(self)


def cost(shape: Shape) -> FirstLayerCost:
    return FirstLayerCost(shape)


def as_text(c: FirstLayerCost) -> str:
    s = c.shape
    weights = [
        ["weights", "numbers"],
        ["W_q and W_o of a block", f"{c.qp_weights:,}"],
        ["W_k and W_v of a block", f"{c.kv_weights:,}"],
        ["FFN of a block", f"{c.ffn_weights:,}"],
        ["embedding and head", f"{c.embedding_weights:,}"],
        ["total", f"{c.total_weights:,}"],
        ["no longer needed in block 0", f"{c.eliminated:,}"],
    ]
    memory = [
        ["memory", "numbers"],
        ["table, beyond the embedding", f"{c.growth:,}"],
        ["weights removed", f"{-c.eliminated:,}"],
        ["net", f"{c.net:,}"],
        ["net, share of all weights", f"{c.relative:.0%}"],
    ]
    reads = [["tokens per pass", "reads without", "reads with", "factor"]]
    for batch in BATCHES:
        numbers = c.reads_without(batch), c.reads_with(batch)
        factor = f"{c.factor(batch):,.{0 if c.factor(batch) >= 2 else 2}f}x"
        reads.append([f"{batch:,}", *(f"{n:,}" for n in numbers), factor])
    lines = [
        *s.heading(c.notes()),
        table(weights),
        "",
        table(reads),
        f"Above {c.break_even:,.0f} tokens per pass the table reads more than the weights.",
        "",
        table(memory),
        "",
        f"Saves {c.eliminated:,} multiply-adds per token, of {c.total_weights:,} weights. At most "
        f"1/{s.layers} ({1 / s.layers:.0%}) of the whole work can be saved.",
    ]
    return "\n".join(lines)
