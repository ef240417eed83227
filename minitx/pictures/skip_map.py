"""``minitx map``: what ran for every token in every layer, under the text that was generated.

    minitx map "Once upon a time" --early-exit preset=paper
    minitx map "Once upon a time" --speculative --svg map.svg

A cell is one block and one token. It compares what the block spent on the token (token_work.py)
with what the dense model's block spends on it when the same text is decoded token by token.
Speculation adds a row: which tokens were accepted guesses, and which were sampled
(rounds.py). This file: the map, and its text. skip_map_svg.py draws it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from minitx.lm import LM
from minitx.pictures.rounds import ACCEPTED, SAMPLED, marks, rounds_text, was_speculative
from minitx.pictures.token_columns import Column, columns_of, lines, name, shown
from minitx.pictures.token_work import MAIN, Spent, TokenWork, generate_observed, run_observed

LITTLE = 1 / 20  # of the dense work of a part: if less was spent, it was skipped (and only that
# decided). It separates a router from the part that it routes to.
NEARLY_ALL = 0.9  # of the dense work of a block: if less was spent, it ran in part

STATES = {  # the character of a cell, and its meaning
    "ran": ("█", "ran"),
    "part": ("▓", f"ran with less than {NEARLY_ALL:.0%} of the dense multiply-adds"),
    "later": ("░", "ran in a later step"),
    "no ffn": ("▀", "FFN skipped"),
    "no attention": ("▄", "attention skipped"),
    "kv": ("▔", "only keys and values cached"),
    "skipped": ("·", "not run"),
    "none": (" ", "a token that the model did not read"),
}


@dataclass(frozen=True)
class Cell:
    """One block and one token. spent, dense: the work here, and in the dense model."""

    state: str  # one of STATES
    spent: Spent
    dense: Spent

    @property
    def share(self) -> float:
        """Of the dense multiply-adds."""
        return self.spent.total / self.dense.total if self.dense.total else 0.0


@dataclass(frozen=True)
class SkipMap:
    """cells: for each model that ran, a row (L) of columns (tokens). rejected: by position, the
    ids of the tokens that were run there and are not in the text. blocks, all: multiply-adds
    relative to dense decoding of the same text, in the blocks and in the whole model (with its
    head)."""

    title: str
    columns: list[Column]
    prompt: int  # tokens
    cells: dict[str, list[list[Cell]]]
    rejected: dict[int, list[int]]
    texts: dict[int, str]  # of all ids that were run, or are in the text
    work: TokenWork
    blocks: float
    all: float

    def __str__(self) -> str:
        return self.text()

    @property
    def states(self) -> list[str]:
        """Those that occur."""
        found = {cell.state for rows in self.cells.values() for row in rows for cell in row}
        return [state for state in STATES if state in found]

    @property
    def sentence(self) -> str:
        return (
            f"{self.blocks:.2f}x of the dense multiply-adds in the blocks, {self.all:.2f}x in all "
            f"({len(self.columns) - self.prompt} new tokens after a prompt of {self.prompt})."
        )

    def text(self, room: int = 100) -> str:
        """The map as text, at most ``room`` characters wide."""
        labels = [label for label, _ in self.rows()]
        wide = max(map(len, labels)) + 2
        parts = []
        for line in lines(self.columns, max(room - wide, 1)):
            found = [" " * wide + "".join(c.text for c in line)]
            for label, row in self.rows():
                if words := "".join(drawn(row(c), c) for c in line).rstrip():
                    found.append(f"{label:{wide}}{words}")
            parts.append("\n".join(word.rstrip() for word in found))
        legend = [f"{STATES[s][0]} {STATES[s][1]}" for s in self.states if s != "none"]
        if legend and "none" in self.states:
            legend.append(f"blank: {STATES['none'][1]}")
        parts.append("   ".join(legend) or "No block of the model ran for any of these tokens.")
        if was_speculative(self.work.rounds):
            sampled = "token sampled from the logits, in [] below"
            parts[-1] += f"\n{ACCEPTED} accepted guess   {SAMPLED} {sampled}"
            parts.append(rounds_text(self.work.rounds, self.texts))
        return "\n\n".join([self.title, *parts, self.sentence])

    def rows(self) -> list:
        """(label, what to draw in a column) for every row."""
        found: list = []
        if was_speculative(self.work.rounds):
            mark = marks(self.work.rounds)
            found.append(("rounds", lambda c: mark.get(c.position, "")))
        for model, rows in self.cells.items():
            for i, row in enumerate(rows):
                label = f"{name_of(model)} {i}"
                found.append((label, lambda c, row=row: STATES[row[c.position].state][0]))
        if self.rejected:
            found.append(("rejected", self.rejected_here))
        return found

    def rejected_here(self, column: Column) -> str:
        """How many tokens were rejected there, in a column as narrow as that of a comma."""
        count = len(self.rejected.get(column.position, ()))
        inside = column.width - column.gap
        return (str(count) if len(str(count)) <= inside else "*").ljust(2) if count else ""

    def as_dict(self) -> dict:
        rounds = [
            {"first": r.first, "tokens": r.ids, "accepted": r.proposed, "rejected": len(r.rejected)}
            for r in self.work.rounds
        ]
        speculative = was_speculative(self.work.rounds)
        return {
            "title": self.title,
            "prompt_tokens": self.prompt,
            "tokens": [{"id": c.id, "text": c.text} for c in self.columns],
            "models": {
                model: [[[cell.state, round(cell.share, 4)] for cell in row] for row in rows]
                for model, rows in self.cells.items()
            },
            "rejected": [self.rejected.get(c.position, []) for c in self.columns],
            "rounds": rounds if speculative else [],
            "multiply_adds_blocks": self.blocks,
            "multiply_adds": self.all,
        }


def drawn(character: str, column: Column) -> str:
    """A cell as wide as its column: one character all over, or a word at its beginning."""
    inside = column.width - column.gap
    if len(character) > 1:
        return " " * column.gap + f"{character:{inside}}"[:inside]
    return " " * column.gap + (character or " ") * inside


def name_of(model: str) -> str:
    """``decode.draft.model`` -> ``draft``; the main model's rows are its layers."""
    words = [w for w in model.split(".") if w not in ("decode", "inner", "model")]
    return "layer" if model == MAIN else " ".join(words) or "model"


# Making one ---------------------------------------------------------------------------------------


def skip_map(
    dense: LM, changed: LM, title: str, prompt, max_new_tokens: int | None = None, **options
) -> SkipMap:
    """Generate a completion with ``changed`` (arguments as for ``LM.tokens``) and map what ran,
    relative to ``dense``, the same model without techniques."""
    changed.need_tokenizer()
    work = generate_observed(changed, prompt, max_new_tokens, **options)
    plain = run_observed(dense, work.prompt, work.ids)
    cells = {model: cells_of(work, plain, model, L) for model, L in work.models.items()}
    rejected = work.rejected()
    ids = {*work.ids, *(id for tokens in rejected.values() for id in tokens)}
    spent, all_spent = sum(s.total for s in work.blocks.values()), total(work)
    before, all_before = sum(s.total for s in plain.blocks.values()), total(plain)
    return SkipMap(
        title,
        columns_of(changed.tokenizer, work.ids),
        len(work.prompt),
        cells,
        rejected,
        {id: shown(changed.tokenizer.decode([id]) or name(changed.tokenizer, id)) for id in ids},
        work,
        spent / before if before else 0.0,
        all_spent / all_before if all_before else 0.0,
    )


def total(work: TokenWork) -> int:
    return work.ledger.total().multiply_adds


def cells_of(work: TokenWork, plain: TokenWork, model: str, L: int) -> list[list[Cell]]:
    same = model == MAIN and L == plain.models[MAIN]
    found = []
    for block in range(L):
        row = []
        for position in range(len(work.ids)):
            dense = plain.of(MAIN, block, position) if same else mean_block(plain, position)
            spent = work.of(model, block, position)
            read = any(work.of(model, b, position).total for b in range(L))
            row.append(Cell(state_of(spent, dense, read, model), spent, dense))
        found.append(row)
    return found


def mean_block(plain: TokenWork, position: int) -> Spent:
    """What a dense block spends on a token, for models whose blocks are not those of the dense
    one."""
    L = plain.models[MAIN]
    blocks: Sequence[Spent] = [plain.of(MAIN, b, position) for b in range(L)]
    return Spent(attn=sum(b.attn for b in blocks) / L, ffn=sum(b.ffn for b in blocks) / L)


def state_of(spent: Spent, dense: Spent, read: bool, model: str = MAIN) -> str:
    """read: did any block run the token?"""
    if not read:
        return "none"
    if model != MAIN:  # of another size, so there is no dense block to compare it with
        return "ran" if spent.total else "skipped"
    whole = spent.other > LITTLE * dense.total  # attention and FFN are one part
    attn = whole or spent.attn + spent.additions["attn"] > LITTLE * dense.attn
    ffn = whole or spent.ffn + spent.additions["ffn"] > LITTLE * dense.ffn
    if not attn and not ffn:
        return "kv" if spent.kv else "skipped"
    if not attn or not ffn:
        return "no ffn" if attn else "no attention"
    if spent.later > spent.total / 2:
        return "later"
    return "part" if spent.total < NEARLY_ALL * dense.total else "ran"
