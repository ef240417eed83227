"""FFNs with ReLU: the only ones in which hidden neurons are exactly 0."""

from minitx import ops
from minitx.errors import MinitxError
from minitx.model import FFN, Activated, SwiGLU
from minitx.technique import NoSuchPart, need
from minitx.tree import Part


def need_relu(name: str, ffn: FFN) -> None:
    """Refuse, for the technique ``name``, an FFN whose neurons are not relu(x @ w + b)."""
    if type(ffn.expand) is not SwiGLU:
        need(ffn.expand, Activated)
        if isinstance(ffn.expand.activation, Part):  # another technique's
            raise NoSuchPart(Activated, found=ffn.expand.activation)
        if ffn.expand.activation is ops.relu:
            return
    other = "SwiGLU" if type(ffn.expand) is SwiGLU else ffn.expand.activation.__name__
    raise MinitxError(
        f"{name} needs FFNs with ReLU, and those of this model have {other}, whose neurons are "
        "often small but hardly ever exactly 0; use a technique that skips small activations."
    )
