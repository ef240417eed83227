"""The configuration of a transformer: everything about a checkpoint except its weights."""

from dataclasses import dataclass

from minitx.errors import MinitxError, abbreviate
from minitx.values import need_field_types

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
FAMILIES = ("llama", "gpt2", "gpt_neox")


@dataclass(frozen=True)
class Config:
    """Names as in the equations: D, L, H, K, d, F, V are width, layers, heads, kv_heads,
    head_width, hidden, vocab_size. The loaders in checkpoints/ translate every other naming into
    this one."""

    family: str  # selects the parts: see build.py
    vocab_size: int  # V
    width: int  # D, the residual stream
    layers: int  # L
    heads: int  # H query heads
    kv_heads: int  # K key/value heads; each serves G = H / K query heads
    head_width: int  # d; H * d need not equal D
    hidden: int  # F, inside the feed-forward network
    context: int  # the longest sequence
    activation: str = "silu"
    norm_eps: float = 1e-5
    rope_width: int = 0  # how many of the d columns are rotated; 0: learned positions
    rope_base: float = 10000.0
    parallel: bool = (
        False  # attention and FFN read the same input and are added together (gpt_neox)
    )
    skipless: bool = False  # no residual connections and no norms
    tied: bool = False  # the head shares the embedding table
    qkv_bias: bool = False
    out_bias: bool = False  # bias of the attention's output projection
    ffn_bias: bool = False
    bos: int | None = None  # token that begins a text, if the model has one
    eos: tuple[int, ...] = ()  # tokens that end a text

    def __post_init__(self):
        need_field_types(self, "The configuration")
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "hidden"):
            _need_positive(name, getattr(self, name))
        _need_positive("context", self.context)
        if self.family not in FAMILIES:
            raise MinitxError(
                f"Unknown model family {abbreviate(self.family)}; choose one of "
                f"{', '.join(FAMILIES)}."
            )
        if self.activation not in ACTIVATIONS:
            raise MinitxError(
                f"Unknown activation {abbreviate(self.activation)}; choose one of "
                f"{', '.join(ACTIVATIONS)}."
            )
        if self.heads % self.kv_heads:
            raise MinitxError(
                f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly; "
                "heads must be a multiple of kv_heads."
            )
        if not (self.rope_base > 1e-30 and 0 <= self.norm_eps < 1e6):  # or they over- or underflow
            raise MinitxError(
                f"The configuration has rope_base = {self.rope_base:g} and norm_eps = "
                f"{self.norm_eps:g}; expected a base above 1e-30 and an epsilon from 0 to 1e6."
            )
        if self.rope_width % 2 or not 0 <= self.rope_width <= self.head_width:
            raise MinitxError(
                f"{self.rope_width} rotary columns do not fit heads of width {self.head_width}; "
                "expected an even number, at most the head width."
            )

    @property
    def group(self) -> int:
        """G, the query heads that share one key/value head."""
        return self.heads // self.kv_heads


def _need_positive(name: str, value) -> None:
    if value < 1:
        raise MinitxError(f"The configuration has {name} = {value}; expected a positive integer.")
