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
    # RoPE scaling for contexts longer than the model was first trained on: divide all frequencies
    # by the factor (linear) or, with a trained context, only the slow ones (llama3); see ops.py.
    rope_factor: float = 1.0
    rope_trained_context: int = 0  # tokens; 0: linear
    rope_low_turns: float = 0.0  # full turns in the trained context up to which ...
    rope_high_turns: float = 0.0  # ... and from which a frequency counts as slow and as fast
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
    # How long the checkpoint lets a text become unless the caller says so; None: fill the context.
    max_new_tokens: int | None = None  # without the prompt; takes precedence
    max_length: int | None = None  # with the prompt

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
        if not self.rope_factor > 0:
            raise MinitxError(f"rope_factor must be above 0, got {self.rope_factor!r}.")
        if self.rope_trained_context and not 0 < self.rope_low_turns < self.rope_high_turns:
            raise MinitxError(
                "RoPE scaling needs 0 < rope_low_turns < rope_high_turns, got "
                f"{self.rope_low_turns} and {self.rope_high_turns}."
            )

    @property
    def group(self) -> int:
        """G, the query heads that share one key/value head."""
        return self.heads // self.kv_heads

    def new_tokens(self, prompt: int) -> int:
        """How many tokens may follow a prompt of this length, unless the caller says so."""
        room = self.context - prompt
        if self.max_new_tokens is not None:
            return min(room, self.max_new_tokens)
        if self.max_length is None:
            return room
        if prompt >= self.max_length:
            raise MinitxError(
                f"The prompt has {prompt} tokens but this checkpoint ends texts at "
                f"{self.max_length} (max_length in its generation_config.json); give "
                "max_new_tokens."
            )
        return min(room, self.max_length - prompt)


def _need_positive(name: str, value) -> None:
    if value < 1:
        raise MinitxError(f"The configuration has {name} = {value}; expected a positive integer.")
