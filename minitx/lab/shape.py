"""The sizes of a transformer, from its ``config.json`` alone, for more architectures than minitx
runs.

The basis of ``minitx cost`` (cost.py): it needs no weights.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from minitx.checkpoints.common import abbreviate, read_json
from minitx.checkpoints.json_object import JsonObject
from minitx.errors import MinitxError


@dataclass(frozen=True)
class Shape:
    """The sizes of a transformer that costs depend on."""

    kind: str  # "model_type" of the file
    width: int  # D
    layers: int  # L
    heads: int  # H query heads
    kv_heads: int  # K key/value heads
    head_width: int  # d
    hidden: int  # F
    ffn_matrices: int  # 3 with a gate, else 2
    experts: int  # 1 unless the FFN is a mixture of several
    vocab_size: int  # V
    positions: int  # learned positions; 0 if there are none
    parallel: bool  # attention and FFN read the same input
    tied: bool  # the head is the embedding table
    notes: tuple[str, ...] = ()  # what was assumed
    context: int = 0  # the longest sequence (of the decoder); 0: not given
    encoder_layers: int = 0  # 0: no encoder; all other sizes are the decoder's
    source: int = 0  # the longest sequence of the encoder

    @property
    def qkv_width(self) -> int:
        """Width of a token's queries, keys and values together."""
        return (self.heads + 2 * self.kv_heads) * self.head_width

    def heading(self, notes) -> list[str]:
        """The first lines of a report: all sizes, the notes, an empty line."""
        return [self.describe(), *(f"Note: {note}." for note in notes), ""]

    def describe(self) -> str:
        """All sizes in one sentence."""
        experts = f"{self.experts} experts of " if self.experts > 1 else ""
        positions = f", {self.positions:,} learned positions" if self.positions else ""
        encoder = f" after an encoder of {self.encoder_layers}" if self.encoder_layers else ""
        return (
            f"{self.kind}: {self.layers} {'parallel' if self.parallel else 'serial'} blocks"
            f"{encoder} of width {self.width:,}, {self.heads} heads of {self.head_width} "
            f"({self.kv_heads} for keys and values), FFN of {experts}{self.ffn_matrices} matrices "
            f"with {self.hidden:,} neurons, {self.vocab_size:,} tokens{positions}."
        )


@dataclass(frozen=True)
class Kind:
    """What a ``model_type`` of transformers implies without a field in the file."""

    gated: bool
    parallel: bool = False
    adds_positions: bool = False
    tied: bool = False
    shares_keys: bool = False  # query heads may share key/value heads; else the field is ignored
    more_positions: int = 0  # rows of the table of positions beyond those that the file gives


LLAMAS = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "phi3", "olmo")
KINDS = {
    **dict.fromkeys(LLAMAS, Kind(True, shares_keys=True)),
    **dict.fromkeys(("gemma", "gemma2"), Kind(True, tied=True, shares_keys=True)),
    "cohere": Kind(True, parallel=True, tied=True, shares_keys=True),
    **dict.fromkeys(("gptj", "gpt_neox", "codegen"), Kind(False, parallel=True)),
    "phi": Kind(False, parallel=True, shares_keys=True),
    "bloom": Kind(False, tied=True),
    "starcoder2": Kind(False, tied=True, shares_keys=True),
    **dict.fromkeys(("gpt2", "gpt_neo"), Kind(False, adds_positions=True, tied=True)),
    "opt": Kind(False, adds_positions=True, tied=True, more_positions=2),
    "whisper": Kind(False, adds_positions=True, tied=True),
    "t5": Kind(False, tied=True),  # gated or not: "feed_forward_proj" says
    **dict.fromkeys(("mt5", "umt5"), Kind(True, tied=True)),
}
# Fields of models whose weights the formulas do not cover.
UNLIKE = (
    *("kv_lora_rank", "multi_query", "new_decoder_architecture"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "n_shared_experts"),
)


def read_shape(path, parallel: bool = False, encoders: bool = False) -> Shape:
    """The sizes in ``path`` (a ``config.json``, or a folder with one). parallel: assume parallel
    blocks, whatever the file says. encoders: accept models with an encoder.

    Raises MinitxError if the file is missing or malformed, lacks a size, or describes a model that
    is not a plain transformer.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    c = JsonObject(path, read_json(path))
    for name in UNLIKE:
        if c.fields.get(name):
            c.reject(name, "these formulas do not cover")
    name = c.string("model_type", "not given").removeprefix("skipless_")
    kind, notes = known_kind(c, name)
    encoder = c.boolean("is_encoder_decoder", False)
    if encoder and not encoders:
        c.reject("is_encoder_decoder", "these formulas do not cover")
    if name == "gpt_neox":
        kind = Kind(False, parallel=c.boolean("use_parallel_residual", True))
    if parallel and not kind.parallel:
        notes += ("assumed to be parallel, as requested: this model is not",)
    width = size(c, "hidden_size", "n_embd", "d_model")
    heads = size(c, "decoder_attention_heads", "num_attention_heads", "n_head", "num_heads")
    if c.positive_int("word_embed_proj_dim", width) != width:
        c.reject("word_embed_proj_dim", "these formulas do not cover")
    if name == "t5":  # "gated-gelu" since version 1.1
        kind = replace(kind, gated=c.string("feed_forward_proj", "relu").startswith("gated"))
    shape = Shape(
        kind=name,
        width=width,
        layers=size(c, *LAYERS),
        heads=heads,
        kv_heads=c.positive_int("num_key_value_heads", heads) if kind.shares_keys else heads,
        head_width=c.positive_int("head_dim", None)
        or c.positive_int("d_kv", None)
        or width // heads,
        hidden=hidden_size(c, kind, width),
        ffn_matrices=3 if kind.gated else 2,
        experts=c.positive_int("num_local_experts", None) or c.positive_int("num_experts", 1),
        vocab_size=c.positive_int("vocab_size"),
        positions=size(c, *POSITIONS) + kind.more_positions if kind.adds_positions else 0,
        parallel=parallel or kind.parallel,
        tied=c.boolean("tie_word_embeddings", kind.tied),
        notes=notes,
        context=size(c, *POSITIONS, default=0),
        encoder_layers=size(c, "encoder_layers", "num_layers") if encoder else 0,
        source=size(c, "max_source_positions", "n_positions", default=0) if encoder else 0,
    )
    need_even_heads(c, shape)
    return shape


LAYERS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", "num_layers")
POSITIONS = ("max_target_positions", "max_position_embeddings", "n_positions")


def known_kind(c: JsonObject, name: str) -> tuple[Kind, tuple[str, ...]]:
    """What the ``model_type`` implies, or a guess that is labelled as one."""
    form = c.string("feed_forward_proj", "not given")  # of T5: "relu", "gated-gelu"
    if name in KINDS:
        kind = KINDS[name]
        t5 = name in ("t5", "mt5", "umt5") and form != "not given"
        return (replace(kind, gated=form.startswith("gated-")) if t5 else kind), ()
    activation = c.string("hidden_act", c.string("activation_function", form))
    gated = activation in ("silu", "swish", "swiglu") or activation.startswith("gated-")
    guess = (
        f"unknown model_type {abbreviate(name)}: assumed to be serial, without learned positions, "
        f"and {'with' if gated else 'without'} a gate in the FFN (its activation "
        f"is {abbreviate(activation)})"
    )
    return Kind(gated, shares_keys=True), (guess,)


def size(c: JsonObject, *names: str, default: int | None = None) -> int:
    """A size under one of several names; the first that is present counts."""
    for name in names:
        if c.fields.get(name) is not None:
            return c.positive_int(name)
    if default is not None:
        return default
    raise MinitxError(
        f"{c.path}: expected a positive integer in one of {', '.join(map(repr, names))}, got none."
    )


def hidden_size(c: JsonObject, kind: Kind, width: int) -> int:
    names = ("decoder_ffn_dim", "intermediate_size", "n_inner", "ffn_dim", "d_ff")
    if not kind.gated and not any(c.fields.get(name) for name in names):
        return 4 * width  # the default of transformers for older models without a gate
    return size(c, *names)


def need_even_heads(c: JsonObject, s: Shape) -> None:
    if s.heads % s.kv_heads:
        raise MinitxError(
            f"{c.path}: {s.heads} query heads cannot share {s.kv_heads} key/value heads evenly; "
            "'num_attention_heads' must be a multiple of 'num_key_value_heads'."
        )
    if s.width % s.heads and c.fields.get("head_dim") is None and c.fields.get("d_kv") is None:
        raise MinitxError(
            f"{c.path}: a width of {s.width} is not a multiple of {s.heads} heads; give 'head_dim'."
        )
