"""The text of ids, for parts that compare texts: a table of the bytes of all tokens, which can be
saved with the model (a tokenizer is saved in a file of its own)."""

from collections.abc import Sequence

import numpy as np

from minitx.tree import Part, part, table


@part
class TokenText(Part):
    """ids -> their bytes."""

    letters: np.ndarray = table()  # the bytes of all tokens, one after another
    ends: np.ndarray = table()  # where each of them ends

    @classmethod
    def of(cls, tokenizer) -> "TokenText":
        """Of each token as in the middle of a text: the first one of a text may lack a space."""
        tokens = [tokenizer.token_bytes(i, previous=i) for i in range(len(tokenizer))]
        letters = np.frombuffer(b"".join(tokens), np.uint8)
        return cls(letters, np.cumsum([len(token) for token in tokens]))

    def __call__(self, ids: Sequence[int]) -> bytes:
        letters, ends = self.letters, self.ends
        return b"".join(letters[ends[i - 1] if i else 0 : ends[i]].tobytes() for i in ids)
