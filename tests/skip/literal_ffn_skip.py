"""FFN-SkipLLM, one token and one layer at a time, in the paper's steps and with Python loops.

Only the attention, FFNs, norm and head of the dense model are used.
"""

import math

import numpy as np


def cosine(a, y) -> float:
    dot = sum(float(p) * float(q) for p, q in zip(a, y))
    lengths = math.sqrt(sum(float(p) ** 2 for p in a)) * math.sqrt(sum(float(q) ** 2 for q in y))
    return dot / lengths


def run(model, ids, threshold, skip, warm_up, cold_start, cold_end):
    """Logits (T, V) of the dense ``model`` with skipped FFNs; which FFNs ran, (T, L) booleans; and
    the cosines that were measured (T, L), NaN elsewhere."""
    blocks = model.stack.blocks
    T, L = len(ids), len(blocks)
    state = model.new_state()
    logits, ran, cosines = [], np.ones((T, L), bool), np.full((T, L), math.nan)
    for t in range(T):
        x = model.embed(np.array([ids[t]]), slice(t, t + 1))
        run_skip = 0
        for l in range(L):  # noqa: E741
            block = blocks[l]
            attention = block.attn(x, state.layers[l].take(1))  # always
            parallel = type(block).__name__ == "ParallelBlock"
            a = x if parallel else x + attention  # the input of the FFN
            y = a + block.ffn(a, state.layers[l])
            if t >= warm_up and cold_start <= l < cold_end:
                if run_skip > 0:
                    run_skip -= 1
                    y = a
                    ran[t, l] = False
                else:
                    cosines[t, l] = cosine(a[0], y[0])
                    if cosines[t, l] >= threshold:
                        run_skip = skip
            x = y + attention if parallel else y
        logits.append(model.head(model.norm(x))[0])
    return np.array(logits), ran, cosines
