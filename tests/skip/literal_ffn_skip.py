"""FFN-SkipLLM, literally: one token at a time, one layer at a time, in plain loops.

Only the dense model's attention and feed-forward networks are taken from minitx. The cosine is a
sum over Python floats.
"""

import math

import numpy as np


def cosine(a, y) -> float:
    dot = sum(float(p) * float(q) for p, q in zip(a, y))
    size = math.sqrt(sum(float(p) ** 2 for p in a)) * math.sqrt(sum(float(q) ** 2 for q in y))
    return dot / size


def run(model, ids, s0, k, warm_up, cold_s, cold_e):
    """The dense ``model`` with skipping: logits (T, V), which FFNs were run (T, L), and the cosine
    of each that was measured (T, L), NaN elsewhere.

    The first ``warm_up`` tokens are run in full.
    """
    blocks = model.stack.blocks
    T, L = len(ids), len(blocks)
    state = model.new_state()
    logits, ran, measured = [], np.ones((T, L), bool), np.full((T, L), math.nan)
    for t in range(T):
        x = model.embed(np.array([ids[t]]), slice(t, t + 1))
        run_skip = 0
        for number in range(L):
            block, layer = blocks[number], state.layers[number]
            mixed = block.attn(x, layer.take(1))
            parallel = type(block).__name__ == "ParallelBlock"
            a = x if parallel else x + mixed  # what the FFN reads
            f = block.ffn(a, layer)
            if t >= warm_up and cold_s <= number < cold_e:
                if run_skip > 0:
                    run_skip -= 1
                    f = 0 * f
                    ran[t, number] = False
                else:
                    sim = cosine(a[0], (a + f)[0])
                    measured[t, number] = sim
                    if sim >= s0:
                        run_skip = k
            x = a + f + mixed if parallel else a + f
        logits.append(model.head(model.norm(x))[0])
    return np.array(logits), ran, measured
