"""Learned positions: one embedding table of sums instead of two tables and an addition.

The card and the option, the part that runs (online), the table (offline), notes.
"""

from typing import Annotated

import numpy as np

from minitx import ops
from minitx.errors import MinitxError
from minitx.model import PositionEmbedding, TokenEmbedding
from minitx.technique import at_least, need, swap, technique
from minitx.tree import Part, part, walk


@technique(level="weights", exact=True, neutral=None)
def merge_embeddings(
    lm,
    *,
    max_bytes: Annotated[int, "refuse a table larger than this; default 256 MiB", at_least(1)] = 256
    * 2**20,
):
    """Precompute the sum of token embedding and position embedding for every pair.

    Paper:     none; plain algebra.
    Fidelity:  our own formulation.
    Kind:      exact, bit for bit: it is the same addition, made earlier. It saves nothing on the
               shipped models: the table of stories-relu takes 43 times the memory of the model.
    Idea:      Rows that are added whenever they are read can be added in advance.
    Offline:   merged[t, p] = tokens[t] + positions[p]    (V, context, D)
               for V tokens, each at every position of the context, and width D
    Online:    x = merged[t, p]    for token t at position p
    Saves:     D additions per token and one of two rows that are read. Costs V * context * D
               numbers instead of (V + context) D; a tied head keeps its V D too.
    In NumPy:  no faster: decoding 1.0x, prompts 0.9x on stories-relu, whose table is 167 MB. Its
               rows come from memory; the two small tables stay in the CPU's caches.
    Not for:   rotary positions, where nothing is added to the embedding. Tables that are not tiny.
               first_layer, which has its own tables for tokens and positions.
    Proof:     tests/precompute/test_merge_embeddings.py; literal version:
               tests/precompute/literal_merge_embeddings.py
    Tutorial:  tutorials/03_before_the_first_token.py
    """
    if not any(type(node) is PositionEmbedding for _, node in walk(lm)):
        check_positions(lm)  # swap raises for anything else

    def merge(embed: PositionEmbedding) -> Part:
        need(embed.tokens, TokenEmbedding)
        tokens, positions = embed.tokens.w, embed.w
        check_size(len(tokens) * positions.nbytes, len(tokens), *positions.shape, max_bytes)
        return MergedEmbedding(tokens[:, None] + positions)  # (V, context, D)

    return swap(lm, PositionEmbedding, merge)


@part
class MergedEmbedding(Part):
    """One row per token at a position."""

    w: np.ndarray  # (V, context, D)

    def __call__(self, ids, where):
        """where: a slice of positions, or an array (B, T) if the texts of a batch have different
        positions."""
        where = np.arange(self.w.shape[1])[where]  # (T,) or (B, T)
        return ops.rows(self.w, (ids, where))  # (..., T, D)


def check_positions(lm: Part) -> None:
    """Say why there is nothing to merge in a plain model with rotary positions."""
    if any(type(node) is TokenEmbedding for _, node in walk(lm)):
        raise MinitxError(
            "merge_embeddings needs learned positions, whose rows are added to those of the "
            "tokens; this model has rotary positions, which are not part of the embedding."
        )


def check_size(size: int, tokens: int, positions: int, width: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise MinitxError(
            f"merge_embeddings: a table of {tokens:,} tokens x {positions:,} positions x {width:,} "
            f"numbers takes {size:,} bytes, expected at most max_bytes={max_bytes}; leave it out, "
            "or raise max_bytes."
        )


# Notes:
#
# - Other rows that are added in advance, in models that minitx does not have: a token-type row
#   merged into the positions (BERT), a norm right after the token table merged into it (BLOOM), a
#   factor sqrt(D) (Gemma, whose tied head needs the table without it).
# - The norm of block 0 reads the sum and stays; first_layer takes it into its tables.
# - Speed: minitx compare -m stories-relu --merge-embeddings
