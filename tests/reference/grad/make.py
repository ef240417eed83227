"""Write grad.npz: torch's loss and gradients for the models of test_model_gradients.py.

Needs torch and transformers; from the root of the project: ``python tests/reference/grad/make.py``.
Each model is built once by minitx and once as the Hugging Face class of its family, in float64 and
with the same weights; loss and gradients are computed by torch alone. The file has one vector per
model: the loss, then the gradients of all weights, flattened, in the order of ``tree.weights``.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
TESTS = HERE.parents[1]
sys.path[:0] = map(str, (HERE.parent, TESTS / "training" / "autograd", TESTS, TESTS.parent))

from double import in_float64  # noqa: E402
from test_model_gradients import MODELS, example, model_of  # noqa: E402

from minitx import tree  # noqa: E402


def llama(c):
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        intermediate_size=c.hidden,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_width,
        max_position_embeddings=c.context,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
        attention_bias=c.qkv_bias,
        mlp_bias=c.ffn_bias,
        tie_word_embeddings=c.tied,
    )
    names = {"embed.w": "model.embed_tokens.weight", "norm.gain": "model.norm.weight"}
    names |= {"head.w": "lm_head.weight.T"}
    parts = {"attn.qkv.q": "self_attn.q_proj", "attn.qkv.k": "self_attn.k_proj"}
    parts |= {"attn.qkv.v": "self_attn.v_proj", "attn.out": "self_attn.o_proj"}
    parts |= {"ffn.expand.gate": "mlp.gate_proj", "ffn.expand.up": "mlp.up_proj"}
    parts |= {"ffn.down": "mlp.down_proj"}
    for i in range(c.layers):
        ours, theirs = f"stack.blocks.{i}", f"model.layers.{i}"
        names[f"{ours}.attn.norm.gain"] = f"{theirs}.input_layernorm.weight"
        names[f"{ours}.ffn.norm.gain"] = f"{theirs}.post_attention_layernorm.weight"
        for a, b in parts.items():
            names |= {
                f"{ours}.{a}.w": f"{theirs}.{b}.weight.T",
                f"{ours}.{a}.b": f"{theirs}.{b}.bias",
            }
    return transformers.LlamaForCausalLM(config), names


def gpt2(c):
    config = transformers.GPT2Config(
        vocab_size=c.vocab_size,
        n_embd=c.width,
        n_inner=c.hidden,
        n_layer=c.layers,
        n_head=c.heads,
        n_positions=c.context,
        activation_function={"gelu_tanh": "gelu_new", "relu": "relu"}[c.activation],
        layer_norm_epsilon=c.norm_eps,
        tie_word_embeddings=c.tied,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    names = {"embed.tokens.w": "transformer.wte.weight", "embed.w": "transformer.wpe.weight"}
    names |= {"norm.gain": "transformer.ln_f.weight", "norm.bias": "transformer.ln_f.bias"}
    names |= {"head.w": "lm_head.weight.T"}
    for i in range(c.layers):
        ours, theirs = f"stack.blocks.{i}", f"transformer.h.{i}"
        for a, b in (("attn.norm", "ln_1"), ("ffn.norm", "ln_2")):
            names |= {
                f"{ours}.{a}.gain": f"{theirs}.{b}.weight",
                f"{ours}.{a}.bias": f"{theirs}.{b}.bias",
            }
        # Conv1D stores (in, out), like minitx; q, k and v are column blocks of one matrix
        parts = {"attn.out": "attn.c_proj", "ffn.expand.up": "mlp.c_fc", "ffn.down": "mlp.c_proj"}
        for a, b in parts.items():
            names |= {
                f"{ours}.{a}.w": f"{theirs}.{b}.weight",
                f"{ours}.{a}.b": f"{theirs}.{b}.bias",
            }
        for j, a in enumerate("qkv"):
            columns = slice(j * c.width, (j + 1) * c.width)
            names[f"{ours}.attn.qkv.{a}.w"] = (f"{theirs}.attn.c_attn.weight", columns)
            names[f"{ours}.attn.qkv.{a}.b"] = (f"{theirs}.attn.c_attn.bias", columns)
    return transformers.GPT2LMHeadModel(config), names


def gpt_neox(c):
    config = transformers.GPTNeoXConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        intermediate_size=c.hidden,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        max_position_embeddings=c.context,
        hidden_act=c.activation,
        layer_norm_eps=c.norm_eps,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": c.rope_base,
            "partial_rotary_factor": c.rope_width / c.head_width,
        },
        use_parallel_residual=c.parallel,
        tie_word_embeddings=c.tied,
    )
    names = {"embed.w": "gpt_neox.embed_in.weight", "head.w": "lm_head.weight.T"}
    names |= {f"norm.{a}": f"gpt_neox.final_layer_norm.{b}" for a, b in NORM}
    parts = {"attn.out": "attention.dense", "ffn.expand.up": "mlp.dense_h_to_4h"}
    parts |= {"ffn.down": "mlp.dense_4h_to_h"}
    for i in range(c.layers):
        ours, theirs = f"stack.blocks.{i}", f"gpt_neox.layers.{i}"
        for a, b in NORM:
            names[f"{ours}.attn.norm.{a}"] = f"{theirs}.input_layernorm.{b}"
            names[f"{ours}.ffn.norm.{a}"] = f"{theirs}.post_attention_layernorm.{b}"
        for a, b in parts.items():
            names |= {
                f"{ours}.{a}.w": f"{theirs}.{b}.weight.T",
                f"{ours}.{a}.b": f"{theirs}.{b}.bias",
            }
        for j, a in enumerate("qkv"):  # rows of one matrix: for each head its q, k and v
            rows = np.arange(3 * c.width).reshape(c.heads, 3, c.head_width)[:, j].reshape(-1)
            fused = f"{theirs}.attention.query_key_value"
            names[f"{ours}.attn.qkv.{a}.w"] = (f"{fused}.weight.T", rows)
            names[f"{ours}.attn.qkv.{a}.b"] = (f"{fused}.bias", rows)
    return transformers.GPTNeoXForCausalLM(config), names


NORM = (("gain", "weight"), ("bias", "bias"))
FAMILIES = {"llama": llama, "gpt2": gpt2, "gpt_neox": gpt_neox}


def place(arrays: dict, name):
    """A torch array in minitx's layout, as (view, columns): ``name``, ``name.T`` or (name,
    columns)."""
    name, columns = name if isinstance(name, tuple) else (name, slice(None))
    view = arrays[name.removesuffix(".T")]
    return view.T if name.endswith(".T") else view, columns


def reference(config):
    theirs, names = FAMILIES[config.family](config)
    theirs = in_float64(theirs)
    ours = tree.weights(model_of(config))
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for path, w in ours.items():
            view, columns = place(parameters, names[path])
            view[..., columns] = torch.from_numpy(w)
    ids, targets, weights = example(config)
    logits = theirs(torch.from_numpy(ids), use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(targets).flatten(), reduction="none"
    )
    loss = (losses * torch.from_numpy(weights).flatten()).sum() / weights.sum()
    loss.backward()
    gradients = {name: p.grad for name, p in parameters.items()}
    found = [place(gradients, names[path]) for path in ours]
    flat = [view[..., columns].reshape(-1).numpy() for view, columns in found]
    assert sum(map(len, flat)) == sum(p.numel() for p in parameters.values()), (
        "the names do not cover all parameters"
    )
    return np.concatenate([[loss.item()], *flat])


if __name__ == "__main__":
    found = {name: reference(config) for name, config in MODELS.items()}
    found["versions"] = np.array(
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    np.savez_compressed(HERE / "grad.npz", **found)
    print(found["versions"], (HERE / "grad.npz").stat().st_size, "bytes")
