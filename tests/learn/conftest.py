"""Few stories for the open exercise: whether its judge is right does not depend on how many."""

import pytest

from minitx.learn import ex18_budget


@pytest.fixture(scope="session", autouse=True)
def few_stories():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ex18_budget, "STORIES", 6)
        patch.setattr(ex18_budget, "PROMPTS", 2)
        yield
