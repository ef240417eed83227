"""One state for prompts that share a prefix: it is rewound to the part that the next one shares."""

from collections.abc import Sequence

from minitx.decode import new_state
from minitx.errors import MinitxError
from minitx.model import Transformer
from minitx.state import State
from minitx.technique import decides


def state_for(
    model: Transformer, prompt: Sequence[int], held: Sequence[int] = (), state: State | None = None
) -> State:
    """A state to decode the prompt with. ``state`` was used for the prompt ``held``: if the new
    prompt begins with ``held``, the state is rewound to the end of it and returned. Otherwise, or
    where that is not possible or would change the result, a new state is returned."""
    begins = len(held) < len(prompt) and list(prompt[: len(held)]) == list(held)
    if state is None or not begins or decides(model) != "token":
        return new_state(model, prompt)
    try:
        state.rewind(min(state.position, len(held)))
    except MinitxError:  # a technique has freed cache rows
        return new_state(model, prompt)
    state.prompt = len(prompt)
    return state
