"""Break one line of the core or of a technique, and of the fundamental tests (test_fundamentals.py)
the one that is meant for it fails first, with a message that names the property.

Each entry replaces one piece of source text in one function or method. The function is compiled
again with the replacement, in its own module, and put in its place for the time of the test. If
somebody rewrites the line, the entry no longer finds it and has to follow.
"""

import inspect
import textwrap
from typing import NamedTuple

import pytest
import test_fundamentals as fundamentals

from minitx import build, decode, fast, model, ops, state
from minitx.precompute import quantize
from minitx.shared import draft_and_verify, folding
from minitx.skip import early_exit
from minitx.skip.early_exit import kv_fill


class Break(NamedTuple):
    owner: object  # the module or class
    function: str
    line: str
    broken: str
    test: str  # of test_fundamentals, without test_
    words: str  # that its message contains


ROTARY, MASK = "direction of the rotary rotation", "causal mask"
BREAKS = {
    "rotation the other way": Break(
        *(ops, "rope_tables", "[-sin, sin]", "[sin, -sin]"),
        *("rotary_direction_and_pairs", ROTARY),
    ),
    "rotary frequency i/d instead of 2i/d": Break(
        *(ops, "rope_tables", "np.arange(0, width, 2,", "np.arange(0, width / 2,"),
        *("rotary_frequencies_are_powers_of_the_base", "rotary frequency base^(-2i/d)"),
    ),
    "rotary positions from 1": Break(
        *(ops, "rope_tables", "np.arange(context, dtype=dtype)", "np.arange(1, context + 1)"),
        *("rotary_position_0_rotates_nothing", "rotary position 0"),
    ),
    "rotated halves not swapped": Break(
        *(
            ops,
            "rotate",
            "[x[..., half:width], x[..., :half]]",
            "[x[..., :half], x[..., half:width]]",
        ),
        *("rotary_direction_and_pairs", ROTARY),
    ),
    "positions of a chunk from 0": Break(
        *(model.Rope, "__call__", "tokens.lookup", "slice(0, len(tokens))"),
        *("rotary_positions_are_those_of_the_tokens", "rotary positions of tokens 5 and 6"),
    ),
    "mask hides a query's own key": Break(
        *(ops, "causal_mask", "np.arange(S) >", "np.arange(S) >="),
        *("causal_mask_shows_a_query_its_own_key", MASK),
    ),
    "mask shows one later key": Break(
        *(ops, "causal_mask", "np.arange(S - T, S)", "np.arange(S - T + 1, S + 1)"),
        *("causal_mask_hides_later_keys", "sees no later key"),
    ),
    "mask aligned to the first keys": Break(
        *(ops, "causal_mask", "np.arange(S - T, S)", "np.arange(T)"),
        *("causal_mask_of_the_newest_tokens", "causal mask of the 2 newest of 4"),
    ),
    "fast mask shows one later key": Break(
        *(fast, "block_mask", "np.arange(T)[:, None]", "np.arange(T)[:, None] + 1"),
        *("causal_mask_hides_later_keys", "sees no later key"),
    ),
    "fast mask hides a query's own key": Break(
        *(fast, "block_mask", "np.arange(T) >", "np.arange(T) >="),
        *("causal_mask_shows_a_query_its_own_key", MASK),
    ),
    "mask of the cache shows one later key": Break(
        *(state.Layer, "mask", "mask = row > query", "mask = row > query + 1"),
        *("causal_mask_hides_later_keys", "KV cache"),
    ),
    "blocks of queries end one key early": Break(
        *(fast, "causal_blocks", "S - T + b", "S - T + b - (b == T)"),
        *("attention_with_equal_scores_averages_the_visible_values", "averages the values 0 to t"),
    ),
    "scores without the scale": Break(
        *(fast, "attention_scores", " * scale", ""),
        *("attention_multiplies_scores_by_the_scale", "scale of the attention scores"),
    ),
    "plain scores without the scale": Break(
        *(ops, "plain_attention", "scores = scale * q", "scores = q"),
        *("attention_multiplies_scores_by_the_scale", "scale of the attention scores"),
    ),
    "scale 1/d": Break(
        *(build, "_attention", "c.head_width**-0.5", "c.head_width**-1.0"),
        *("attention_scale_of_a_model_is_one_over_the_root_of_the_head_width", "1/sqrt(8)"),
    ),
    "softmax over the queries": Break(
        *(ops, "softmax", "e.sum(-1,", "e.sum(-2,"),
        *("softmax_is_over_the_last_axis", "softmax over the keys"),
    ),
    "softmax without the maximum": Break(
        *(ops, "softmax", "x - x.max(-1, keepdims=True)", "x"),
        *("softmax_of_large_scores_does_not_overflow", "subtract the maximum"),
    ),
    "attention weights not normalized": Break(
        *(fast, "weighted_sum", "p.sum(-1, keepdims=True)", "1"),
        *("attention_multiplies_scores_by_the_scale", "scale of the attention"),
    ),
    "key heads tiled": Break(
        *(fast, "attention_scores", "q.reshape(*lead, K, H // K * T, d)"),
        "q.reshape(*lead, H // K, K, T, d).swapaxes(-4, -3).reshape(*lead, K, H // K * T, d)",
        *("grouped_heads_repeat_key_heads", "repeat, not tile"),
    ),
    "norm by the sum": Break(
        *(ops, "rms_norm", "squares.item() / x.shape[-1]", "squares.item()"),
        *("rms_norm_divides_by_the_root_of_the_mean_square", "not of their sum"),
    ),
    "norm of several rows by the sum": Break(
        *(ops, "rms_norm", "np.sqrt(squares / x.shape[-1]", "np.sqrt(squares"),
        *("rms_norm_divides_by_the_root_of_the_mean_square", "not of their sum"),
    ),
    "epsilon outside the root": Break(
        *(ops, "rms_norm", "math.sqrt(squares.item() / x.shape[-1] + eps)"),
        "(math.sqrt(squares.item() / x.shape[-1]) + eps)",
        *("rms_norm_adds_epsilon_under_the_root", "under the root"),
    ),
    "norm without its gain": Break(
        *(ops, "rms_norm", "x * (gain / np.sqrt", "x * (1 / np.sqrt"),
        *("rms_norm_multiplies_each_column_by_its_gain", "gain of the RMS norm"),
    ),
    "layer norm keeps the mean": Break(
        *(ops, "layer_norm", "rms_norm(x - ", "rms_norm(x - 0 * "),
        *("layer_norm_subtracts_the_mean_and_adds_the_bias", "subtracts the mean"),
    ),
    "linear layer without its bias": Break(
        *(ops, "linear", "y + b", "y"),
        *("linear_is_x_times_w_plus_b", "bias of a linear layer"),
    ),
    "heads split in the wrong order": Break(
        *(model, "split_heads", "reshape(*x.shape[:-1], heads, x.shape[-1] // heads)"),
        "reshape(*x.shape[:-1], x.shape[-1] // heads, heads).swapaxes(-1, -2)",
        *("heads_are_slices_of_columns", "split into heads"),
    ),
    "heads merged in the wrong order": Break(
        *(
            model,
            "merge_heads",
            "x = x.swapaxes(-3, -2)",
            "x = x.swapaxes(-3, -2).swapaxes(-1, -2)",
        ),
        *("heads_are_slices_of_columns", "merge heads"),
    ),
    "attention replaces the residual stream": Break(
        *(model.Block, "__call__", "x = x + self.attn(x, layer)", "x = self.attn(x, layer)"),
        *("block_adds_to_the_residual_stream", "residual stream"),
    ),
    "FFN replaces the residual stream": Break(
        *(model.Block, "__call__", "return x + self.ffn", "return self.ffn"),
        *("block_adds_to_the_residual_stream", "residual stream"),
    ),
    "parallel block forgets the FFN": Break(
        *(model.ParallelBlock, "__call__", " + self.ffn(x, layer)", ""),
        *("parallel_block_reads_the_input_twice", "residual stream of a parallel block"),
    ),
    "gate and up exchanged": Break(
        *(model.SwiGLU, "__call__", "self.gate(x), self.up(x)", "self.up(x), self.gate(x)"),
        *("swiglu_is_silu_of_the_gate_times_up", "SwiGLU"),
    ),
    "gate without its sign": Break(
        *(ops, "swiglu", "np.exp(-gate)", "np.exp(gate)"),
        *("swiglu_is_silu_of_the_gate_times_up", "SwiGLU"),
    ),
    "position not added": Break(
        *(model.PositionEmbedding, "__call__", " + ops.rows(self.w, positions)", ""),
        *("embedding_adds_the_position_of_each_token", "row of its position"),
    ),
    "tied head reads other rows": Break(
        *(model.TiedHead, "__call__", "self.w)", "self.w[::-1])"),
        *("head_scores_each_vocabulary_entry", "tied head"),
    ),
    "position of the sequence stands still": Break(
        *(model.Transformer, "hidden", "state.position += ids.shape[-1]", "pass"),
        *("kv_cache_token_by_token_equals_one_pass", "KV cache"),
    ),
    "rewind keeps the rows": Break(
        *(state.Layer, "rewind", "min(self.count, position)", "self.count"),
        *("kv_cache_forgets_what_is_rewound", "rewind of the KV cache"),
    ),
    "logits multiplied by the temperature": Break(
        *(decode.Sampler, "probabilities", "z /= max", "z *= max"),
        *("sampling_divides_logits_by_the_temperature", "logits / temperature"),
    ),
    "top-p before the temperature": Break(
        *(decode.Sampler, "probabilities", "~nucleus(p, "),
        "~nucleus(ops.softmax(logits.astype(np.float64)), ",
        *("sampling_applies_the_temperature_before_top_p", "temperature before top-p"),
    ),
    "top-p drops the token that crosses p": Break(
        *(decode, "nucleus", "order[: reached + 1]", "order[: max(reached, 1)]"),
        *("sampling_top_p_keeps_the_token_that_crosses_p", "top-p keeps the smallest set"),
    ),
    "top-k keeps one too many": Break(
        *(decode.Sampler, "probabilities", "top_k_mask(logits, self.top_k)"),
        "top_k_mask(logits, self.top_k + 1)",
        *("sampling_keeps_the_top_k", "top-k keeps the k largest"),
    ),
    "acceptance rule inverted": Break(
        *(draft_and_verify, "accept_or_resample", "p[x] / q[x]", "q[x] / p[x]"),
        *("acceptance_rule_is_p_over_q", "acceptance rule min(1, p/q)"),
    ),
    "acceptance only if p is at least q": Break(
        *(draft_and_verify, "accept_or_resample", "min(1.0, p[x] / q[x])", "float(p[x] >= q[x])"),
        *("acceptance_rule_is_p_over_q", "acceptance rule min(1, p/q)"),
    ),
    "rejected token drawn from p": Break(
        *(draft_and_verify, "accept_or_resample", "residual_distribution(p, q)", "p"),
        *("rejection_draws_from_the_residual_distribution", "residual distribution"),
    ),
    "residual of the draft": Break(
        *(
            draft_and_verify,
            "residual_distribution",
            "np.maximum(p - q, 0)",
            "np.maximum(q - p, 0)",
        ),
        *("residual_distribution_is_what_the_draft_lacks", "residual distribution max(0, p - q)"),
    ),
    "residual not normalized": Break(
        *(draft_and_verify, "residual_distribution", "residual / total", "residual"),
        *("residual_distribution_is_what_the_draft_lacks", "normalized"),
    ),
    "verification goes on after a rejection": Break(
        *(draft_and_verify, "verify", "return tokens\n", "pass\n"),
        *("verification_stops_at_the_first_rejection", "ends at the first rejection"),
    ),
    "no token of the target at the end": Break(
        *(draft_and_verify, "verify", "[*tokens, sampler(logits[-1])]", "tokens"),
        *("verification_stops_at_the_first_rejection", "adds a token of the target"),
    ),
    "exit when unsure": Break(
        *(early_exit.ExitingStack, "run_one_until_exit", "conf >= threshold", "conf < threshold"),
        *("exit_condition_is_confidence_of_at_least_the_threshold", "exit condition"),
    ),
    "several tokens exit when unsure": Break(
        *(early_exit.ExitingStack, "exits", "conf >= threshold", "conf < threshold"),
        *("exit_condition_is_confidence_of_at_least_the_threshold", "exit condition"),
    ),
    "exit one layer early": Break(
        *(
            early_exit.ExitingStack,
            "run_until_exit",
            "range(self.first, L)",
            "range(self.first, L - 1)",
        ),
        *("exit_condition_is_confidence_of_at_least_the_threshold", "exit condition"),
    ),
    "skipped layers without keys and values": Break(
        *(kv_fill.CopyExitState, "skip", "block.backfill(x, layer)", "pass"),
        *("kv_backfill_fills_skipped_layers_from_the_exit_state", "KV backfill"),
    ),
    "scaled before the zero point is subtracted": Break(
        *(quantize, "dequantize", "return codes * scales[:, None]"),
        "return (codes + zero_points[:, None]) * scales[:, None] - zero_points[:, None]",
        *("dequantization_subtracts_the_zero_point_before_scaling", "dequantization"),
    ),
    "zero point added": Break(
        *(quantize, "dequantize", "codes - zero_points", "codes + zero_points"),
        *("dequantization_subtracts_the_zero_point_before_scaling", "scale * (code - zero point)"),
    ),
    "scale from the largest instead of the largest magnitude": Break(
        *(quantize, "quantize_groups_symmetric", "abs(w).max(1)", "w.max(1)"),
        *("quantization_rounds_to_the_scale_of_the_group", "largest magnitude"),
    ),
    "codes truncated": Break(
        *(quantize, "quantize_groups_symmetric", "np.rint(", "np.trunc(0.999 * "),
        *("quantization_rounds_to_the_scale_of_the_group", "rounded"),
    ),
    "gain folded into the columns": Break(
        *(folding, "fold_into", "gain[:, None] * w", "gain * w"),
        *("folding_a_norm_scales_the_rows_of_the_next_matrix", "multiplies the rows"),
    ),
}


def with_broken_line(b: Break):
    """The function of ``b`` with the line broken, compiled in its own module."""
    source = textwrap.dedent(inspect.getsource(vars(b.owner)[b.function]))
    assert source.count(b.line) == 1, (
        f"{b.function} no longer contains {b.line!r} exactly once; adapt the entry to its new text"
    )
    module = b.owner if inspect.ismodule(b.owner) else inspect.getmodule(b.owner)
    inside: dict = {}
    exec(compile(source.replace(b.line, b.broken), module.__file__, "exec"), vars(module), inside)
    return inside[b.function]


def first_failure() -> tuple[str, str]:
    """(name, message) of the first fundamental test that fails, as with ``pytest -x``; ("", "") if
    none does."""
    for name, test in vars(fundamentals).items():
        if name.startswith("test_"):
            try:
                test()
            except AssertionError as failure:
                return name, str(failure)
    return "", ""


def test_unbroken_fundamentals_pass():
    """Or the tests below would prove nothing."""
    assert first_failure() == ("", "")


@pytest.mark.parametrize("b", BREAKS.values(), ids=BREAKS)
def test_broken_line_is_named_by_its_fundamental_test(b, monkeypatch):
    monkeypatch.setattr(b.owner, b.function, with_broken_line(b))
    built_anew = fundamentals.tiny_model.__wrapped__  # not one from before the break
    monkeypatch.setattr(fundamentals, "tiny_model", built_anew)
    name, message = first_failure()
    assert name == f"test_{b.test}" and b.words in message, f"{name or 'no test'} failed: {message}"
