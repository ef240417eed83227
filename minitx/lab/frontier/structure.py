"""The methods of ``minitx frontier structure``: one entry for each way to skip layers, sub-layers,
heads, neurons or tokens, and two baselines.

An entry names the technique, its knob with the range that is searched, and the options that stay
fixed. ``random`` are the options that make it its own random baseline (``--random``). A method
without a knob saves bytes instead of multiply-adds and is shown at its own settings.
"""

from minitx.lab.frontier.knobs import AT_RANDOM, Knob, Method, falling, rising


def count(high, name: str = "count", low: int = 0) -> Knob:
    """How many are skipped (or merged into one): up to ``high(config)``."""
    return Knob(name, low, high, falling=True, scale="linear", integer=True)


def tolerance(low: float, high: float = 10.0) -> Knob:
    """How much skipping may cost: the more, the less is executed."""
    return Knob("tolerance", low, high, falling=True)


def ids(name: str) -> Knob:
    """How many token ids are left, of a byte-level vocabulary."""
    return Knob(name, 256, lambda config: config.vocab_size, integer=True)


def layers(config) -> int:
    return config.layers


def but_one(config) -> int:
    return config.layers - 1


def sublayers(config) -> int:
    return 2 * config.layers - 1


def later_ffns(config) -> dict:
    """All FFNs may be skipped but those of the first layers, all of them at once."""
    L = config.layers
    return {"cold_start": max(1, L // 2 - 1), "cold_end": L, "skip": L, "warm_up": 0}


def share_of_later_ffns(config) -> float:
    return 1 - later_ffns(config)["cold_start"] / config.layers


PLAN = {"unit": "both"}
ROUTED = {"router": "fitted", "every": 1}  # all blocks but the first
TRAINED_ROUTER = falling("threshold", 32.0, -32.0)  # of models trained with it: stories-mod

METHODS = (
    # Baselines: which sub-layers are dropped, for all tokens, is drawn, or selected greedily.
    Method("random", count(sublayers), PLAN | AT_RANDOM, "layer_skip", seeds=(0, 1, 2, 3)),
    Method("static", count(sublayers), PLAN | {"choose": "greedy", "stories": 8}, "layer_skip"),
    Method("layer_skip layer", count(but_one), {"unit": "layer"}, "layer_skip"),
    Method("layer_skip attention", count(but_one), {"unit": "attention"}, "layer_skip"),
    Method("layer_skip ffn", count(but_one), {"unit": "ffn"}, "layer_skip"),
    Method("layer_skip both", count(sublayers), PLAN, "layer_skip"),
    Method("layer_merge", count(layers, "size", 1)),
    Method("layer_router", tolerance(1e-5), random=AT_RANDOM),
    Method("switchable", tolerance(1e-5), random=AT_RANDOM, random_knob=rising("share", 0.0)),
    Method("early_exit", rising("threshold", 0.0), {"first": 2}, random={"measure": "random"}),
    Method(
        "ffn_skip",
        rising("threshold", 0.0),
        later_ffns,
        random=AT_RANDOM,
        random_knob=falling("rate", share_of_later_ffns),
    ),
    Method("head_prune", falling("share", 0.95), random=AT_RANDOM),
    Method("head_cascade", falling("start=end", 0.95), {"unpruned": 0.3}, random=AT_RANDOM),
    Method("head_router", rising("active", 0.0), {"first": 1}, random=AT_RANDOM),
    Method("mixture_of_depths", rising("capacity", 0.01), ROUTED, random={"router": "random"}),
    Method("mixture_of_depths trained", TRAINED_ROUTER, {"router": "trained"}, "mixture_of_depths"),
    Method("token_prune", rising("keep", 0.01), random=AT_RANDOM),
    Method("lazy_tokens", rising("keep", 0.05), {"first": 1}, random=AT_RANDOM),
    Method("prune_structure neurons", falling("neurons", 0.95), {"heads": 0.0}, "prune_structure"),
    Method("prune_structure heads", falling("heads", 0.95), {"neurons": 0.0}, "prune_structure"),
    Method("value_prune", rising("keep", 0.01), random=AT_RANDOM),
    Method("vocab_prune", ids("keep"), random=AT_RANDOM),
    # Fewer bytes instead of multiply-adds, too few of these for any share, or none at all.
    Method("kv_share", None),
    Method("layer_fusion", None),
    Method("layer_reorder", None),
    Method("norm_skip", None),
    Method("value_prune default", None, {}, "value_prune"),
    Method("vocab_prune default", None, {}, "vocab_prune"),
)
