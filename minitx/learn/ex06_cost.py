"""Exercise 6: What a token costs (25 minutes)

Before you skip work, count it. The unit is the multiply-add: one product that is added to a sum. A
row of m numbers times a matrix (m, n) takes m * n of them, and a dot product of d numbers takes d.

Count one step of a model like Llama. T new tokens go through it, the last T of S tokens; the keys
and values of the S - T earlier ones are in the KV cache. T = S is the prompt (prefill), T = 1 the
generation of one token (decode). `config` has the sizes of the model as attributes:

    config.layers      L
    config.width       D   columns of the residual stream
    config.heads       H   query heads
    config.kv_heads    K   heads of keys and values; K may be smaller than H
    config.head_width  d   H * d need not equal D
    config.hidden      F   neurons of the feed-forward network
    config.vocab_size  V

In each layer, every new token goes through seven matrices:

    queries (D, H * d)      keys (D, K * d)      values (D, K * d)      output (H * d, D)
    gate (D, F)             up (D, F)            down (F, D)

Also in each layer, every query head compares its query with the keys that it may see (d
multiply-adds per key), and adds up their values (d more per key). The query of a token sees the
token itself and everything before it; what is masked is not computed, so it does not count. At the
end, the output head, a matrix (D, V), computes the logits of the last token only.

Norms, softmax, rotations, activations and the lookup of embeddings are not counted.

    multiply_adds(config, T, S)  of the whole step
    cache_bytes(config, S)       what the keys and values of S tokens take in the KV cache, over all
                                 layers, in float32 (4 bytes a number)

By hand: L = 1, D = 4, H = 2, K = 1, d = 3, F = 5, V = 10. The matrices take 24 + 12 + 12 + 24 for
attention and 3 * 20 for the feed-forward network, 132 per token. With T = 2 and S = 3, the first
new token sees 2 keys and the second one 3, so each of the 2 heads sees 5, and each costs 3 + 3: 60.
The output head takes 40. Together: 2 * 132 + 60 + 40 = 364. The cache holds 3 tokens, each with a
key and a value of 3 numbers: 18 numbers, 72 bytes.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(
    ...     layers=1, width=4, heads=2, kv_heads=1, head_width=3, hidden=5, vocab_size=10
    ... )
    >>> multiply_adds(config, 2, 3)
    364
    >>> cache_bytes(config, 3)
    72

Source: Kaplan et al., "Scaling Laws for Neural Language Models", 2020, table 1, which counts the
same parts in floating-point operations, two per multiply-add.
"""

from types import SimpleNamespace

import numpy as np

import minitx
from minitx import fast, ledger
from minitx.lab.layout import table
from minitx.learn.exercise import Exercise, Mistake


# solution
def multiply_adds(config, T, S):
    """Multiply-adds of one step in which T new tokens, the last of S, go through the model."""
    D, H, K, d = config.width, config.heads, config.kv_heads, config.head_width
    projections = D * H * d + 2 * D * K * d + H * d * D
    feed_forward = 3 * D * config.hidden
    keys_seen = sum(range(S - T + 1, S + 1))  # the first new token sees S - T + 1, the last one S
    layer = T * (projections + feed_forward) + H * keys_seen * 2 * d
    return config.layers * layer + D * config.vocab_size


def cache_bytes(config, S):
    """Bytes of the keys and values of S tokens in all layers, in float32."""
    return config.layers * S * 2 * config.kv_heads * config.head_width * 4


# end of solution


def count_one_by_one(config, T, S):
    """Every product by itself."""
    count = 0
    H, d = config.heads, config.head_width
    inner, outer = H * d, config.kv_heads * d
    D, F = config.width, config.hidden
    matrices = [(D, inner), (D, outer), (D, outer), (inner, D), (D, F), (D, F), (F, D)]
    for _ in range(config.layers):
        for query in range(S - T, S):
            count += sum(m * n for m, n in matrices)
            for _head in range(H):
                for _key in range(query + 1):
                    count += d + d
    return count + D * config.vocab_size


def bytes_one_by_one(config, S):
    numbers = 0
    for _layer in range(config.layers):
        for _token in range(S):
            for _head in range(config.kv_heads):
                numbers += config.head_width + config.head_width
    return 4 * numbers


in_loops = SimpleNamespace(multiply_adds=count_one_by_one, cache_bytes=bytes_one_by_one)


def flawed_count(
    config,
    T,
    S,
    *,
    kv="K",
    square=False,
    output=True,
    matrices=3,
    passed="T",
    pairs="visible",
    attending="H",
    new_included=True,
    halves=2,
    head="once",
    flops=1,
):
    D, H, K, d = config.width, config.heads, config.kv_heads, config.head_width
    inner = D if square else H * d
    projections = D * inner + 2 * D * (H if kv == "H" else K) * d + output * inner * D
    feed_forward = matrices * D * config.hidden
    S = S if new_included else S + T
    visible = T * S - T * (T - 1) // 2
    keys_seen = {
        "visible": visible,
        "masked": T * S,
        "own hidden": visible - T,
        "one": S,
        "new": T * (T + 1) // 2,
    }[pairs]
    rows = {"T": T, "S": S, "one": 1}[passed]
    layer = rows * (projections + feed_forward)
    layer += (H if attending == "H" else K) * keys_seen * halves * d
    times = {"once": 1, "all tokens": T, "all layers": config.layers, "never": 0}[head]
    return flops * (config.layers * layer + times * D * config.vocab_size)


def flawed_bytes(config, S, *, cached="K", arrays=2, layers=True, size=4):
    heads = {"K": config.kv_heads, "H": config.heads}[cached]
    return (config.layers if layers else 1) * S * arrays * heads * config.head_width * size


MISTAKES = (
    Mistake(
        "multiply_adds: the matrices of keys and values have K heads (kv_heads), not H.", kv="H"
    ),
    Mistake(
        "multiply_adds: the matrices of queries and of the output have H * d columns and rows, "
        "which need not be D.",
        square=True,
    ),
    Mistake("multiply_adds: the output matrix of attention, (H * d, D), is missing.", output=False),
    Mistake(
        "multiply_adds: the feed-forward network has three matrices; you count two.", matrices=2
    ),
    Mistake(
        "multiply_adds: you count masked pairs. A query does not see later tokens: the first new "
        "token sees S - T + 1 keys, the last one S.",
        pairs="masked",
    ),
    Mistake(
        "multiply_adds: a token sees its own key, too, so the last one sees S keys, not S - 1.",
        pairs="own hidden",
    ),
    Mistake(
        "multiply_adds: the new tokens also see the S - T tokens in the KV cache, not only each "
        "other.",
        pairs="new",
    ),
    Mistake("multiply_adds: you count one new token; there are T.", pairs="one", passed="one"),
    Mistake(
        "multiply_adds: only the T new tokens go through the matrices; what the S - T earlier ones "
        "need is in the KV cache.",
        passed="S",
    ),
    Mistake(
        "multiply_adds: fewer key heads (K) do not make attention cheaper: each of the H query "
        "heads meets the keys.",
        attending="K",
    ),
    Mistake(
        "multiply_adds: S includes the T new tokens; you count them twice.", new_included=False
    ),
    Mistake(
        "multiply_adds: you count the scores, but not the weighted sum of the values, which costs "
        "as much.",
        halves=1,
    ),
    Mistake(
        "multiply_adds: logits are needed only after the last token, so the head counts once, not "
        "T times.",
        head="all tokens",
    ),
    Mistake(
        "multiply_adds: the head comes after the last layer, once; it is not in every layer.",
        head="all layers",
    ),
    Mistake("multiply_adds: the head, (D, V), is missing.", head="never"),
    Mistake(
        "multiply_adds: you count the multiplication and the addition as two; a multiply-add is "
        "one.",
        flops=2,
    ),
    Mistake("cache_bytes: the cache holds K heads (kv_heads), not H.", cached="H"),
    Mistake(
        "cache_bytes: that is half of it. The cache holds keys and values, and each number takes "
        "4 bytes.",
        arrays=1,
    ),
    Mistake("cache_bytes: every layer has its own cache.", layers=False),
    Mistake("cache_bytes: these are numbers; each takes 4 bytes.", size=1),
    Mistake("cache_bytes: these are bits; a byte has 8 of them.", size=32),
)


def observe(answer, config, T, S):
    return {
        "multiply_adds": answer.multiply_adds(config, T, S),
        "cache_bytes": answer.cache_bytes(config, S),
    }


class Sizes(SimpleNamespace):
    """A configuration that is short to read in a message."""

    def __repr__(self):
        letters = dict(layers="L", width="D", heads="H", kv_heads="K", head_width="d", hidden="F")
        return " ".join(f"{letters.get(name, 'V')}={size}" for name, size in vars(self).items())


def cases(rng):
    """Prefill, decode, and a chunk in between; sizes that cannot be confused."""
    for T, S in ((5, 5), (1, 7), (3, 8)):
        K = int(rng.integers(2, 4))
        D, d, F, V = (int(size) for size in rng.permutation(np.arange(11, 40))[:4])
        sizes = dict(layers=T + 1, width=D, heads=3 * K, kv_heads=K)
        yield Sizes(**sizes, head_width=d, hidden=F, vocab_size=V), T, S


# What it shows -----------------------------------------------------------------------------------

SMOLLM2 = SimpleNamespace(
    layers=30, width=576, heads=9, kv_heads=3, head_width=64, hidden=1536, vocab_size=49152
)


def show(answer):
    """The answer's counts beside what the ledger counts while ``stories`` runs."""
    lm = minitx.load("stories")
    config, ids = lm.model.config, lm.encode("Once upon a time") * 40
    rows = [["multiply-adds in stories", "yours", "counted by minitx"]]
    state = lm.model.new_state()
    for T, name in ((100, "a prompt of 100 tokens"), (1, "token 101"), (1, "token 102")):
        first = state.position
        with ledger.counting(lm.model) as counts:
            lm.model.next_logits(ids[first : first + T], state)
        yours = int(answer.multiply_adds(config, T, first + T))
        rows.append([name, f"{yours:,}", f"{counts.total().multiply_adds:,}"])
    big = [["SmolLM2-135M", "multiply-adds of the next token", "KV cache"]]
    for S in (100, 1000, 8192):
        cost, size = int(answer.multiply_adds(SMOLLM2, 1, S)), answer.cache_bytes(SMOLLM2, S)
        big.append([f"{S:,} tokens", f"{cost:,}", f"{size / 1e6:,.1f} MB"])
    note = (
        f"For a prompt, minitx computes the scores of {fast.ROWS} queries at a time, some masked "
        "pairs included, so it counts a little more than you."
    )
    return f"{table(rows)}\n\n{note}\n\n{table(big)}"


EXERCISE = Exercise(
    title="What a token costs",
    minutes=25,
    difficulty="medium",
    names=("multiply_adds", "cache_bytes"),
    cases=lambda rng: list(cases(rng)),
    observe=observe,
    flawed={"multiply_adds": flawed_count, "cache_bytes": flawed_bytes},
    mistakes=MISTAKES,
    hints=(
        "Start with T = 1 and one layer: seven matrices, each rows times columns, and attention "
        "over S keys. Which of these grow with T? Which happen once per layer, which once in all?",
        "The new tokens see S - T + 1, S - T + 2, ..., S keys: sum(range(S - T + 1, S + 1)) in "
        "each of the H query heads, each key at 2 * d. The seven matrices count T times, both of "
        "these in every layer; the head, D * V, counts once.",
    ),
    library="minitx/ledger.py: product (counted while the model runs)",
    show=show,
    saves=(
        "These formulas say what a technique can save at most: skipping half of all feed-forward "
        "networks, say, saves half of 3 * D * F per layer and token, and nothing else."
    ),
)
