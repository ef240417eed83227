"""One state for prompts that begin alike: it is rewound to what the next prompt shares."""

from collections.abc import Sequence

from minitx.decode import new_state
from minitx.errors import MinitxError
from minitx.model import Transformer
from minitx.state import State
from minitx.technique import decides


def state_for(
    model: Transformer, prompt: Sequence[int], held: Sequence[int] = (), state: State | None = None
) -> State:
    """A state to decode the prompt with. ``state`` was used for the prompt ``held``: if the new one
    begins with that, it is rewound to its end and returned. An empty state where that is not
    possible, or would change the result."""
    begins = len(held) < len(prompt) and list(prompt[: len(held)]) == list(held)
    if state is None or not begins or decides(model) != "token":
        return new_state(model, prompt)
    try:
        state.rewind(min(state.position, len(held)))
    except MinitxError:  # a technique has freed cache rows
        return new_state(model, prompt)
    state.prompt = len(prompt)
    return state
