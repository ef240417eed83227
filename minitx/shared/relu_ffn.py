"""FFNs with ReLU: the only ones in which hidden neurons are exactly 0."""

import numpy as np

from minitx import ops
from minitx.errors import MinitxError
from minitx.model import FFN, Activated, Linear, SwiGLU
from minitx.progress import bar
from minitx.shared.observed_inputs import Rows, watched
from minitx.technique import NoSuchPart, need
from minitx.tree import Part, walk


def need_relu(name: str, ffn: FFN) -> None:
    """Refuse, for the technique ``name``, an FFN whose neurons are not relu(x @ w + b)."""
    if type(ffn.expand) is not SwiGLU:
        need(ffn.expand, Activated)
        if isinstance(ffn.expand.activation, Part):  # another technique's
            raise NoSuchPart(Activated, found=ffn.expand.activation)
        if ffn.expand.activation is ops.relu:
            return
    gated = type(ffn.expand) is SwiGLU
    other = "SwiGLU" if gated else ffn.expand.activation.__name__
    raise MinitxError(
        f"{name} needs FFNs with ReLU, and those of this model have {other}, whose neurons are "
        f"often small but hardly ever exactly 0; use {'cats or ' * gated}teal for small ones."
    )


def inputs_of_up(lm, texts: list[list[int]], label: str) -> dict[int, np.ndarray]:
    """The inputs (n, D) of each W_up while the model reads the texts, by the id of its part. In
    SwiGLU (this works for it too) they are those of W_gate as well. An FFN that another technique
    always skips has none."""
    wanted = {id(node.expand.up) for _, node in walk(lm.model) if type(node) is FFN}
    observed, observers = watched(lm.model, Linear, Rows, wanted)
    for ids in bar(texts, label, unit="text", delay=1.0):
        observed.hidden(ids)
    return {key: rows.all for key, rows in observers.items() if rows.pieces}
