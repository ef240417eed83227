"""For caches of whole answers: a token loop whose batches run only prompts without a stored answer.

A technique adds ``__call__`` for one prompt, and ``begin``, which looks up its answer.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from minitx.decode import Sampler, TokenLoop
from minitx.model import Transformer
from minitx.tree import Part


class NewAnswer(Protocol):
    """An answer that is being generated."""

    ended: bool  # its text has ended

    def add(self, token: int) -> None:
        """Called before the token is yielded, since the caller may not come back after the last."""


class AnswerLoop(TokenLoop):
    """Base class of loops around a store of answers."""

    inner: Part  # the loop that generates the other answers

    def begin(
        self, model: Transformer, ids: Sequence[int], choose: Sampler, limit: int, held: int = 0
    ) -> tuple[list[int], NewAnswer]:
        """The stored answer, [] if there is none; and the new answer, to which the loop adds the
        tokens that are generated. held: tokens of the prompt that were run before, if that can
        change the answer."""
        raise NotImplementedError

    def batch(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        choosers: Sequence[Sampler],
        limit: int,
    ) -> Iterator[list[int]]:
        """B prompts: see ``TokenLoop``. Those without a stored answer run in one batch; a row whose
        stored answer has ended repeats its last token."""
        begun = [self.begin(model, ids, choose, limit) for ids, choose in zip(prompts, choosers)]
        missing = [row for row, (stored, _) in enumerate(begun) if not stored]
        steps: Iterator = iter([[]] * limit)
        if missing:
            rows = [prompts[row] for row in missing], [choosers[row] for row in missing]
            steps = self.inner.batch(model, *rows, limit)
        for t, tokens in enumerate(steps):
            generated = dict(zip(missing, tokens))
            for row, token in generated.items():
                if not begun[row][1].ended:  # after its end a row may yield anything
                    begun[row][1].add(token)
            yield [
                generated[row] if row in generated else stored[min(t, len(stored) - 1)]
                for row, (stored, _) in enumerate(begun)
            ]
