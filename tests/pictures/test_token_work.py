"""Which tokens each block worked on: compared with what is known by hand, by formula, or from the
technique itself, and with the totals of the ledger."""

import numpy as np
import pytest
from tiny import tiny_lm

from minitx import ledger
from minitx.pictures.token_work import (
    Spent,
    TokenWatcher,
    block_of,
    generate_observed,
    in_rounds,
    model_of,
    run_observed,
    some_rows,
)
from minitx.state import Layer
from minitx.technique import apply, find

PROMPT, NEW = "once upon a time", 10
GREEDY = dict(max_new_tokens=NEW, temperature=0)


def observed(flags, family="llama", **more):
    return generate_observed(apply(tiny_lm(family), flags), PROMPT, **GREEDY | more)


def test_dense_block_spends_what_the_formula_says():
    """D=16, H=2 heads and K=1 key head of d=8, F=24. A token at position p attends to p + 1 keys:
    q and out take D H d each, k and v D K d each, attention 2 H d (p + 1), the FFN 3 D F."""
    work = observed({})
    prompt = len(work.prompt)
    for p in range(prompt, len(work.ids) - 1):
        expected = 2 * 16 * 16 + 2 * 16 * 8 + 2 * 16 * (p + 1)
        assert work.of("model", 1, p).attn == expected, f"attention of the token at position {p}"
        assert work.of("model", 1, p).ffn == 3 * 16 * 24, f"FFN of the token at position {p}"
    shared = 2 * 16 * 16 + 2 * 16 * 8 + 2 * 16 * prompt
    attn = [work.of("model", 0, p).attn for p in range(prompt)]
    assert np.allclose(attn, shared), "a prompt's attention is shared evenly by its tokens"
    last = work.of("model", 0, len(work.ids) - 1)
    assert last == Spent(), "the last token predicts nothing, so it is not run"


@pytest.mark.parametrize(
    "flags",
    [
        {"early_exit": {"measure": "random", "threshold": 0.5, "kv_fill": "deferred"}},
        {"mixture_of_depths": {"router": "random", "capacity": 0.5, "first": 0}},
        {"token_prune": {"keep": 0.4, "first": 1}, "perforate_positions": {"stride": 2}},
        {"self_speculative": {"layers": 1, "gamma": 3, "stop": 0.0}},
        {"lookahead": {"window": 2, "ngram": 3}, "fuse_projections": {}},
        {"majority_vote": {"votes": 2}},
    ],
    ids=lambda flags: "+".join(flags),
)
def test_work_of_all_tokens_sums_to_the_ledger(flags):
    work = observed(flags)
    assert work.blocks, "nothing was observed"
    counted = {path: entry.multiply_adds for path, entry in work.ledger.entries.items()}
    for model, block in {key[:2] for key in work.blocks}:
        cells = sum(s.total for key, s in work.blocks.items() if key[:2] == (model, block))
        whole = sum(n for p, n in counted.items() if (block_of(p) or ())[:2] == (model, block))
        assert cells == pytest.approx(whole), f"block {block} of {model}"


def test_watching_changes_neither_the_text_nor_what_is_counted():
    lm = apply(tiny_lm(), {"self_speculative": {"layers": 1, "gamma": 3, "stop": 0.0}})
    work = generate_observed(lm, PROMPT, **GREEDY)
    with ledger.counting(lm) as counts:
        ids = list(lm.tokens(PROMPT, **GREEDY))
    assert work.ids == work.prompt + ids
    assert work.ledger.entries == counts.entries
    assert work.ledger.events == counts.events


def test_ffn_ran_only_at_the_positions_of_perforate_positions():
    """Within the prompt, too, whose tokens run in one step."""
    work = observed({"perforate_positions": {"stride": 3, "first": 1}})
    for p in range(len(work.ids) - 1):
        ran = [work.of("model", block, p).ffn > 0 for block in (0, 1)]
        assert ran == [True, p % 3 == 0], f"position {p}"


def test_block_ran_only_the_tokens_that_the_router_let_in():
    flags = {"mixture_of_depths": {"router": "random", "capacity": 0.5, "first": 1}}
    lm = apply(tiny_lm(), flags)
    work = generate_observed(lm, PROMPT, **GREEDY)
    router = lm.model.stack.blocks[1].router
    enter = router.scores[1, : len(work.ids) - 1] < router.capacity
    assert enter.any() and not enter.all(), "the setting must let in some tokens"
    ran = [work.of("model", 1, p).ffn > 0 for p in range(len(enter))]
    assert ran == enter.tolist()


def test_ffn_ran_for_the_tokens_that_were_not_found_in_a_table():
    """memoize_ffn gives the FFN some rows of a prompt and does not say whose they are."""
    work = observed({"memoize_ffn": find("memoize_ffn").demo})
    assert work.ledger.events["hits"], "the setting must hit"
    for block in (0, 1):
        events = work.ledger.events_at.get(f"model.stack.blocks.{block}.ffn", {})
        spent = [work.of("model", block, p).ffn for p in range(len(work.ids) - 1)]
        ran = sum(ffn >= 3 * 16 * 24 for ffn in spent)
        assert ran == events.get("lookups", len(spent)) - events.get("hits", 0), f"block {block}"


def test_early_exit_backfills_or_defers_the_layers_after_the_exit():
    options = {"measure": "random", "threshold": 0.5, "first": 1}
    copied = observed({"early_exit": options})
    exited = [p for p in range(len(copied.ids) - 1) if not copied.of("model", 1, p).ffn]
    assert exited, "some tokens must exit"
    for p in exited:
        spent = copied.of("model", 1, p)
        assert spent.kv == 2 * 16 * 8 and spent.attn == 0, "only the projections to k and v"
    deferred = observed({"early_exit": options | {"kv_fill": "deferred"}})
    text = copied.ids[: len(exited)]
    assert deferred.ids[: len(text)] == text, "the exits are by position, so they are the same"
    later = [p for p in range(len(deferred.ids)) if deferred.of("model", 1, p).later]
    assert later and set(later) <= set(exited), "what ran later had exited"
    assert all(deferred.of("model", 1, p).later == deferred.of("model", 1, p).total for p in later)


def test_rejected_token_is_not_taken_for_the_one_in_the_text():
    """Every guess is run by all layers, right or wrong, and each has a cell of its own."""
    work = observed({"jacobi": {"guesses": 3, "choose": "random"}})
    wrong = work.rejected()
    assert wrong and all(id != work.ids[p] for p, ids in wrong.items() for id in ids)
    for position, ids in wrong.items():
        for id in ids:
            assert work.blocks["model", 1, (position, id)].ffn >= 3 * 16 * 24


@pytest.mark.parametrize(
    "name, settings",
    [
        ("self_speculative", {"layers": 1, "gamma": 3, "stop": 0.0}),
        ("prompt_lookup", {}),
        ("jacobi", {}),
        ("lookahead", {"window": 4}),  # runs several guesses for one position
    ],
)
def test_rounds_agree_with_what_the_loop_counts_about_itself(name, settings):
    work = observed({name: settings}, max_new_tokens=24)
    events, rounds = work.ledger.events, work.rounds
    assert sum((r.ids for r in rounds), []) == work.ids[len(work.prompt) :]
    accepted = events["draft tokens accepted"] + events["guesses accepted"]
    proposed = events["draft tokens proposed"] + events["guesses checked"] + events["rows run"]
    assert len(rounds) == events["target passes"] + events["passes"]
    assert sum(r.proposed for r in rounds) == accepted
    rejected = sum(len(r.rejected) for r in rounds)
    assert 0 < rejected <= proposed - accepted  # a wrong guess may equal the token that came later


def test_last_token_of_a_round_is_sampled_even_if_it_was_a_guess_on_another_branch():
    watcher = TokenWatcher()

    def loop():
        watcher.calls, watcher.run = 1, {(5, 11): None, (6, 12): None, (6, 13): None}
        yield from (11, 12)  # 11 was accepted; 12 was guessed after another token than 11
        watcher.calls, watcher.run = 2, {(7, 14): None}
        yield 14  # and here the text ends, inside of a round

    ids, (first, last) = in_rounds(loop(), 5, watcher)
    assert ids == [11, 12, 14]
    assert (first.ids, first.proposed, first.rejected) == ([11, 12], 1, [(6, 13)])
    assert (last.first, last.proposed) == (7, 1)


def test_work_belongs_to_the_tokens_of_the_layer_at_that_time():
    """A method may set ``layer.tokens`` to some of them, and work before and after."""
    watcher, layer = TokenWatcher(), Layer.once(3)
    path = "model.stack.blocks.0.ffn"
    watcher.enter("model.embed", "__call__", (np.array([7, 8, 9]), slice(0, 3)))
    watcher.enter(path, "__call__", (np.zeros((3, 4)), layer))
    watcher.spend(path, 30, 0)
    layer.tokens = layer.tokens.only([1])
    watcher.spend(path, 5, 0)
    assert [watcher.blocks["model", 0, (p, 7 + p)].ffn for p in range(3)] == [10, 15, 10]


def test_plain_run_of_a_text_costs_what_generating_it_does():
    generated = observed({})
    known = run_observed(tiny_lm(), generated.prompt, generated.ids)
    assert known.blocks == generated.blocks


def test_rows_are_found_among_those_that_they_were_taken_from():
    whole = np.array([[1, 2], [3, 4], [1, 2], [5, 6]])
    tokens = [(p, 10 + p) for p in range(4)]
    assert some_rows(whole[[1, 3]], whole, tokens) == [(1, 11), (3, 13)]
    assert some_rows(whole[[0, 2]], whole, tokens) == [(0, 10), (2, 12)], "equal rows, in order"
    assert some_rows(whole[3], whole, tokens) == [(3, 13)], "a single row"
    assert some_rows(np.array([[9, 9]]), whole, tokens) == [], "none of them"
    assert some_rows(whole[[3, 1]], whole, tokens) == [], "another order"


def test_path_belongs_to_a_block_of_a_model():
    for path, place in (
        ("model.stack.blocks.3.inner.ffn.down", ("model", 3, "ffn")),
        ("model.stack.inner.blocks.12", ("model", 12, "")),
        ("decode.draft.model.stack.blocks.0.attn", ("decode.draft.model", 0, "attn")),
        ("model.head", None),
    ):
        assert block_of(path) == place, path
    assert model_of("decode.draft.model.embed") == "decode.draft.model"
