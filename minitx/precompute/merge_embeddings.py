"""Tables whose rows are added become one table: a row for every token at every position."""

import numpy as np

from minitx import ops
from minitx.errors import MinitxError
from minitx.model import PositionEmbedding, TokenEmbedding
from minitx.technique import need, swap, technique
from minitx.tree import Part, part, walk


@technique(level="weights", exact=True, neutral=None)
def merge_embeddings(lm, *, max_bytes: int = 256 << 20):
    """Look up the sum of a token's row and a position's row, instead of adding the two.

    Paper: none; plain algebra. Rows of tables that are added whenever they are read can be added
        beforehand.
    Kind: exact, and bit for bit: the one addition that is made is the one that was left out.
    Skips or precomputes: with learned positions, the addition of token and position.
    Offline: EP[t, p] = E[t] + P[p] for every token t and position p: (V, context, D).
    Online: x = EP[t, p], p being the position in the token's own sequence.
    Saves: D additions a token, which the ledger does not count, and the reading of one of two rows
        of D numbers. It costs V context D numbers in the place of (V + context) D, or beside V D of
        them where the head is the embedding table (tied) and keeps its own. So it is for tiny
        tables only. In NumPy it is slower than adding, most of all for a prompt: with a table that
        is larger than the CPU's cache, each row comes from memory.
    Neutral: nothing to set.
    Not for: rotary positions, where nothing is added to the embedding. A table of more than
        max_bytes. first_layer, which has tables of its own for tokens and positions. The other
        tables that can be merged so have no place in the three families: a token-type row into the
        positions (BERT), a norm right behind the token table into it (BLOOM), a factor sqrt(D) into
        it (Gemma, where the tied head needs the table without). A norm behind the sum, as in block
        0, stays: it is first_layer that takes it in.
    """
    if not any(type(node) is PositionEmbedding for _, node in walk(lm)):
        need_learned_positions(lm)

    def merge(embed: PositionEmbedding) -> Part:
        need(embed.tokens, TokenEmbedding)
        tokens, places = embed.tokens.w, embed.w
        size = len(tokens) * places.nbytes
        if size > max_bytes:
            raise MinitxError(
                f"merge_embeddings would make a table of {len(tokens):,} tokens x {len(places):,} "
                f"positions x {places.shape[1]:,} numbers, {size:,} bytes, which is above "
                f"max_bytes={max_bytes}; leave it out, or raise max_bytes."
            )
        return MergedEmbedding(tokens[:, None] + places)

    return swap(lm, PositionEmbedding, merge)


def need_learned_positions(lm: Part) -> None:
    """Say why there is nothing to merge, where the model is a plain one without such a table."""
    if any(type(node) is TokenEmbedding for _, node in walk(lm)):
        raise MinitxError(
            "merge_embeddings needs learned positions, whose rows are added to the tokens' rows; "
            "this model has rotary positions, which turn queries and keys and add nothing."
        )


@part
class MergedEmbedding(Part):
    """One row of a table per token at a position."""

    w: np.ndarray  # (V, context, D)

    def __call__(self, ids, where):
        where = np.arange(self.w.shape[1])[where]  # (T,) of a slice; ragged batch: (B, T)
        return ops.rows(self.w, (ids, where))  # (..., T, D)
