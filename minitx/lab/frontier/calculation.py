"""The methods of ``minitx frontier calculation``: one entry for each way to skip products inside
the matrices and attention, and two baselines.

An entry is explained in structure.py. Some fit only FFNs with ReLU (``-m stories-relu``), others
only SwiGLU; the command says which do not fit the model. Exact techniques have no knob.
"""

from minitx.lab.frontier.knobs import AT_RANDOM, Knob, Method, falling, rising

BITS = Knob("bits", 1, 32, scale="linear", integer=True)
WINDOW = Knob("window", 1, 512, integer=True)
STRIDE = Knob("stride", 1, 64, falling=True, integer=True)
EACH_TOKEN = {"prompts": "skip"}  # as in decoding; the union of a text's tokens is all rows
UNIFORM = {"rates": "uniform", "stories": 4}

METHODS = (
    # Baselines: inputs of all matrices are dropped at random, for all tokens (nothing replaces
    # them), or the neurons are removed that matter least.
    Method(
        "random",
        falling("rate", 0.95),
        UNIFORM | {"pattern": "sample", "fill": "none"},
        "perforate",
        seeds=(0, 1),
    ),
    Method("static", falling("neurons", 0.95), {"heads": 0.0}, "prune_structure"),
    # Zeros and small numbers
    Method("cats", falling("sparsity", 0.99), EACH_TOKEN, random=AT_RANDOM),
    Method("teal", falling("sparsity", 0.95), EACH_TOKEN, random=AT_RANDOM),
    Method(
        "teal uniform",
        falling("sparsity", 0.95),
        EACH_TOKEN | {"allocation": "uniform"},
        "teal",
        random=AT_RANDOM,
    ),
    # Negatives and predictions
    Method("negative_predict", falling("miss", 1.0), random=AT_RANDOM),
    Method("contextual_sparsity", rising("neurons", 0.02), random=AT_RANDOM),
    Method(
        "contextual_sparsity threshold", falling("threshold", 6.0, -10.0), {}, "contextual_sparsity"
    ),
    # Re-use
    Method("delta", falling("threshold", 3.0), random=AT_RANDOM),
    Method("dot_product_reuse", BITS, {"form": "lsh"}, random=AT_RANDOM),
    Method("memoize_ffn", falling("radius", 2.0), random=AT_RANDOM),
    Method("memoize_attention", falling("radius", 3.0), random=AT_RANDOM),
    # Perforation
    Method(
        "perforate",
        falling("rate", 0.75),
        random={"rates": "random"},
    ),
    Method("perforate uniform", falling("rate", 0.95), UNIFORM, "perforate"),
    Method("perforate_positions", STRIDE, random=AT_RANDOM),
    Method("perforate_keys", WINDOW, {"stride": 64}, random=AT_RANDOM),
    # Exact, or fewer bytes instead of multiply-adds.
    Method("zero_skip", None),
    Method("negative_skip", None),
    Method("dot_product_reuse default", None, {}, "dot_product_reuse"),
    Method("progressive_precision", None),
    Method("perforate_keys default", None, {}, "perforate_keys"),
)
