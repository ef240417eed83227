"""``minitx cost``: what a technique saves on a model of any size, from its ``config.json`` alone.

Here the sizes are read from the file, of more kinds of model than minitx runs: no weights are
needed. The formulas of each technique stand in a file of their own (``cost_first_layer.py``).
"""

from dataclasses import dataclass
from pathlib import Path

from minitx.errors import MinitxError
from minitx.files.common import read_json, short
from minitx.files.fields import Fields


@dataclass(frozen=True)
class Shape:
    """The sizes of a transformer, as far as costs depend on them."""

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
    positions: int  # rows of a table that is added to the embedding; 0 if there is none
    parallel: bool  # attention and FFN read the same input
    tied: bool  # the head is the embedding table
    notes: tuple[str, ...] = ()  # what was assumed


@dataclass(frozen=True)
class Kind:
    """What a ``model_type`` of transformers means without saying so in the file."""

    gated: bool
    parallel: bool = False
    adds_positions: bool = False
    tied: bool = False


KINDS = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "phi3", "olmo"), Kind(True)),
    **dict.fromkeys(("gemma", "gemma2"), Kind(True, tied=True)),
    "cohere": Kind(True, parallel=True, tied=True),
    **dict.fromkeys(("gptj", "gpt_neox", "phi", "codegen"), Kind(False, parallel=True)),
    **dict.fromkeys(("bloom", "starcoder2"), Kind(False, tied=True)),
    **dict.fromkeys(("gpt2", "gpt_neo", "opt"), Kind(False, adds_positions=True, tied=True)),
}
# Fields of models whose weights are not those that the formulas count.
UNLIKE = (
    *("is_encoder_decoder", "kv_lora_rank", "multi_query", "new_decoder_architecture"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "n_shared_experts"),
)


def read_shape(path, parallel: bool = False) -> Shape:
    """The sizes in the file ``path`` (a ``config.json``, or a folder with one); ``parallel``: as if
    its blocks were parallel, whatever it says.

    Raises MinitxError where the file is missing or malformed, lacks a size, or is of a model whose
    weights are not those of a plain transformer.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    c = Fields(path, read_json(path))
    for name in UNLIKE:
        if c.fields.get(name):
            c.refuse(name, "these formulas do not know")
    name = c.text("model_type", "not given")
    kind, notes = known_kind(c, name)
    if name == "gpt_neox":
        kind = Kind(False, parallel=c.flag("use_parallel_residual", True))
    if parallel and not kind.parallel:
        notes += ("taken as parallel, as asked: this model is not",)
    width = size(c, "hidden_size", "n_embd", "d_model")
    heads = size(c, "num_attention_heads", "n_head", "num_heads")
    if c.count("word_embed_proj_dim", width) != width:
        c.refuse("word_embed_proj_dim", "these formulas do not know")
    shape = Shape(
        kind=name,
        width=width,
        layers=size(c, "num_hidden_layers", "n_layer", "num_layers"),
        heads=heads,
        kv_heads=c.count("num_key_value_heads", heads),
        head_width=c.count("head_dim", None) or width // heads,
        hidden=hidden_size(c, kind, width),
        ffn_matrices=3 if kind.gated else 2,
        experts=c.count("num_local_experts", None) or c.count("num_experts", 1),
        vocab_size=c.count("vocab_size"),
        positions=size(c, "max_position_embeddings", "n_positions") if kind.adds_positions else 0,
        parallel=parallel or kind.parallel,
        tied=c.flag("tie_word_embeddings", kind.tied),
        notes=notes,
    )
    need_even_heads(c, shape)
    return shape


def known_kind(c: Fields, name: str) -> tuple[Kind, tuple[str, ...]]:
    """What the ``model_type`` means, or a guess that is said to be one."""
    if name in KINDS:
        return KINDS[name], ()
    activation = c.text("hidden_act", c.text("activation_function", "not given"))
    gated = activation in ("silu", "swish", "swiglu")
    guess = (
        f"the model_type {short(name)} is not known here: taken as serial, without positions added "
        f"to the embedding, and {'with' if gated else 'without'} a gate in the FFN (its activation "
        f"is {short(activation)})"
    )
    return Kind(gated), (guess,)


def size(c: Fields, *names: str) -> int:
    """A size that has several spellings."""
    for name in names:
        if c.fields.get(name) is not None:
            return c.count(name)
    raise MinitxError(
        f"{c.path}: has none of {', '.join(map(repr, names))}; needed is a positive whole number."
    )


def hidden_size(c: Fields, kind: Kind, width: int) -> int:
    names = ("intermediate_size", "n_inner", "ffn_dim")
    if not kind.gated and not any(c.fields.get(name) for name in names):
        return 4 * width  # what transformers takes for all the older models without a gate
    return size(c, *names)


def need_even_heads(c: Fields, s: Shape) -> None:
    if s.heads % s.kv_heads:
        raise MinitxError(
            f"{c.path}: {s.heads} query heads cannot share {s.kv_heads} key/value heads evenly; "
            "'num_attention_heads' must be a multiple of 'num_key_value_heads'."
        )
    if s.width % s.heads and c.fields.get("head_dim") is None:
        raise MinitxError(
            f"{c.path}: a width of {s.width} is not a multiple of {s.heads} heads; give 'head_dim'."
        )
