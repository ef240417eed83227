"""What techniques learn their settings from: stories of the calibration split, always the same."""

from functools import lru_cache
from itertools import islice

from minitx.training.stories import stories


def calibration_texts(lm, count: int) -> list[list[int]]:
    """Ids of so many stories of grade full, cut to the model's context. Needs a tokenizer."""
    context = lm.model.config.context
    return [lm.tokenizer.encode(text)[:context] for text in _texts(count)]


@lru_cache
def _texts(count: int) -> tuple[str, ...]:
    return tuple(story.text for story in islice(stories("calibration", "full", 0), count))
