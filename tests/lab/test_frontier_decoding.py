"""``minitx frontier decoding``: calls and work counted by hand on tiny models, ratios, and rows."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
from tiny import tiny_folder, tiny_lm

from minitx.decode import Sampler, TokenLoop, new_state
from minitx.errors import MinitxError
from minitx.lab.frontier import decoding, decoding_methods
from minitx.lab.frontier.decoding import (
    GREEDY,
    SAMPLED,
    Calls,
    Measured,
    Plan,
    Runner,
    Work,
    agreement,
    compare_decoding,
    continuation,
    to_continue,
)
from minitx.lab.frontier.decoding_methods import LEFT_OUT, METHODS, PLAIN, Way, way
from minitx.lab.frontier.decoding_report import LEGEND, times
from minitx.ledger import Entry, counting
from minitx.second_model import SMALL
from minitx.state import State
from minitx.technique import apply, find, techniques
from minitx.text import Text
from minitx.tree import part

DENSE = METHODS[0]
POND = Text("The balance of once and twice: a fence, a pond, and a stone. " * 20, "pond.txt")
PLAN = Plan(text=POND, prompts=2, length=20, new=10, rounds=2)
CACHE = way("prefix_cache block=4", "prefix_cache", {"block": 4})
SELF = way("speculative draft=self", "speculative", {"draft": "self", "gamma": 3})
# Drafts that stop when they are unsure need to be told to propose gamma tokens in every round.
ALWAYS_GAMMA = {"stop": 0.0} if "stop" in find("speculative").options else {}


def endless(**changes):
    """A tiny model whose texts do not end."""
    lm = tiny_lm()
    return replace(lm, model=replace(lm.model, config=replace(lm.model.config, eos=(), **changes)))


def compared(*methods, plan=PLAN):
    return compare_decoding(endless(), (DENSE, *methods), plan, bar=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Plain decoding, a draft that is the target's twin, its first half, and a prefix cache."""
    twin = str(tiny_folder(tmp_path_factory.mktemp("models") / "twin"))
    draft = way("speculative twin", "speculative", {"draft": twin, "gamma": 4} | ALWAYS_GAMMA)
    missing = way("speculative none", "speculative", {"draft": "nowhere"})
    return compared(draft, SELF, CACHE, missing, way("block=0", "prefix_cache", {"block": 0}))


def row(found, method, sampling=GREEDY, seen=False):
    wanted = (method, sampling, seen)
    return next(r for r in found.rows if (r.method, r.sampling, r.seen) == wanted)


# The table ---------------------------------------------------------------------------------------


def test_every_technique_that_decodes_has_a_method_or_a_reason():
    shown = {name for method in METHODS for name in method.techniques}
    for technique in techniques():
        if technique.level in ("decode", "answer"):
            assert (technique.name in shown) != (technique.name in LEFT_OUT), (
                f"{technique.name} needs a method in decoding_methods.py, or a reason there"
            )
    assert METHODS[0].name == PLAIN and not METHODS[0].techniques


def test_options_of_techniques_beside_are_valid():
    for method in METHODS:
        for name, options in method.techniques.items():
            find(name).checked(options)


def test_second_model_is_the_one_that_is_wanted():
    both = way("a", "prefix_cache", {}, speculative={"draft": SMALL, "gamma": 2})
    wanted = both.with_small("mine").techniques
    assert wanted == {"prefix_cache": {}, "speculative": {"draft": "mine", "gamma": 2}}
    assert way("b", "speculative", {"draft": "self"}).with_small("mine").options["draft"] == "self"


# Calls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_plain_decoding_calls_the_model_once_for_each_token(found, sampling):
    figures = row(found, PLAIN, sampling).figures
    assert figures.tokens == 2 * 10 and figures.calls == {"model": 1.0}
    assert figures.tokens_per_call == 1.0 and figures.other_calls == 0
    assert (figures.multiply_adds, figures.weight_bytes, figures.cache_bytes) == (1, 1, 1)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_draft_that_is_the_targets_twin_has_every_token_accepted(found, sampling):
    """10 tokens in 2 rounds of gamma + 1 = 5: 2 calls of the target, 2 * 4 of the draft."""
    figures = row(found, "speculative twin", sampling).figures
    assert figures.tokens_per_call == pytest.approx(5), "gamma + 1"
    assert figures.calls["decode.draft.model"] == figures.other_calls == pytest.approx(4 / 5)
    assert figures.multiply_adds > 1.5, "both models run every token"


def test_calls_of_a_draft_that_shares_blocks_are_counted_as_its_own():
    lm = apply(endless(), {"speculative": {"draft": "self", "gamma": 3}})
    with counting(lm) as counts:
        counts.entered = calls = Calls(lm)
        list(continuation(lm, [1, 2, 3, 4], 12, Sampler()))
    assert calls.counts["model"] == counts.events["target passes"]
    drafts = sum(calls.counts.values()) - calls.counts["model"]
    assert drafts == counts.events["draft tokens proposed"]


@part
class FirstLayerDrafts(TokenLoop):
    """Prefill without logits; then, for each token, a pass of the first block, and a whole one."""

    def __call__(self, model, state: State, ids, choose, limit):
        model.hidden(ids[:-1], state)
        for _ in range(limit):
            x = model.embed(np.array(ids[-1:]), state.take(1).lookup)
            model.head(model.norm(model.stack.run(x, state, 0, 1)))
            state.layers[0].rewind(state.position)
            ids = [*ids, model.next_argmax(ids[-1:], state)]
            yield ids[-1]


def test_pass_of_the_first_layers_is_no_call_of_the_model_and_prefill_is_none_at_all():
    lm = replace(endless(), decode=FirstLayerDrafts())
    with counting(lm) as counts:
        counts.entered = calls = Calls(lm)
        assert len(list(continuation(lm, [1, 2, 3], 5, Sampler()))) == 5
    assert calls.counts == {"model": 5, "model, first layers": 5}


def test_logits_in_pieces_are_one_call():
    lm = endless()
    with counting(lm) as counts:
        counts.entered = calls = Calls(lm)
        hidden = lm.model.hidden([1, 2, 3])
        for piece in hidden:
            lm.model.head(lm.model.norm(piece))
    assert calls.counts == {"model": 1}


# Work --------------------------------------------------------------------------------------------


def test_prompts_seen_before_run_their_last_token_only(found):
    """Of 20 prompt tokens 5 blocks of 4 are stored, and 19 reused."""
    lm, seen = endless(), row(found, CACHE.name, seen=True).figures
    work = {}
    for cached in (0, 19):
        entry = Entry()
        for prompt in to_continue(lm, PLAN)[0]:
            state = new_state(lm.model, prompt)
            if cached:
                lm.model.hidden(prompt[:cached], state)
            with counting(lm) as counts:
                list(lm.decode(lm.model, state, prompt, Sampler(), PLAN.new))
            entry += counts.total()
        work[cached] = entry
    expected = work[19].multiply_adds / work[0].multiply_adds
    assert seen.multiply_adds == pytest.approx(expected, rel=1e-12)
    for sampling in (GREEDY, SAMPLED):
        new = row(found, CACHE.name, sampling).figures
        assert new.multiply_adds == 1, f"{sampling}: new prompts save nothing"
    assert seen.same == 2 and seen.calls == {"model": 1.0}


def test_only_methods_with_a_store_have_a_row_of_prompts_seen_before(found):
    names = {(r.method, r.sampling) for r in found.rows if r.seen}
    assert names == {(CACHE.name, GREEDY), (CACHE.name, SAMPLED)}


def test_exact_methods_give_the_text_of_plain_decoding(found):
    for one in found.rows:
        if one.figures and one.sampling == GREEDY:
            assert (one.exact, one.figures.same, one.figures.agreement) == (True, 2, 1), one.name
        elif one.figures:
            assert one.figures.same is None is one.figures.agreement, "samples differ"


def test_text_ends_with_end_of_text():
    lm = endless()
    first = list(continuation(lm, [1, 2, 3], 6, Sampler()))
    config = replace(lm.model.config, eos=(first[2],))
    ending = replace(lm, model=replace(lm.model, config=config))
    end = first.index(first[2]) + 1
    assert list(continuation(ending, [1, 2, 3], 6, Sampler())) == first[:end]


def test_agreement_ends_at_the_first_difference():
    """3 of 4 tokens and 1 of 2, of a text that is longer."""
    assert agreement([[1, 2, 3, 9], [5, 6]], [[1, 2, 3, 4], [5]]) == 4 / 5
    assert agreement([[9, 2]], [[1, 2]]) == 0


def test_ratios_are_those_of_each_rounds_sums():
    """Round 1: 4 s for 8 tokens against 2 s for 8: twice as fast. Round 2: 4 times."""
    one = Measured(GREEDY, [[1]], 8)
    plain, fast = Work([[0] * 8], Entry(800, 80, 8), {}), Work([[0] * 4], Entry(600, 10, 2), {})
    one.work = {(PLAIN, False): plain, ("fast", False): fast, ("fast", True): fast}
    one.rounds = [
        {(PLAIN, False): (1.0, 4.0, 8), ("fast", False): (2.0, 2.0, 8)},
        {(PLAIN, False): (1.0, 4.0, 8), ("fast", False): (1.0, 2.0, 16)},
    ]
    for times_of_seen in one.rounds:  # prompts seen before: beside plain decoding at that time
        times_of_seen |= {(PLAIN, True): (6.0, 6.0, 8), ("fast", True): (1.0, 1.0, 4)}
    seen = one.figures("fast", True, one.rounds)
    assert seen.speed["median"] == 3 and seen.first["median"] == 6
    figures = one.figures("fast", False, one.rounds)
    costs = figures.multiply_adds, figures.weight_bytes, figures.cache_bytes
    assert costs == (1.5, 0.25, 0.5), "150 per token instead of 100; 2.5 of 10; 0.5 of 1"
    assert figures.speed == {"median": 3, "lowest": 2, "highest": 4}
    assert figures.first == {"median": 0.75, "lowest": 0.5, "highest": 1}
    assert figures.tokens_per_call is None, "the model did not run"
    assert one.plain_speed(2) == 2 and one.plain_first(2) == 1
    assert times(figures.speed) == "3.00 2.00-4.00"
    assert times({"median": 12.34, "lowest": 9.0, "highest": 15.0}) == "12.3 9.0-15.0"


@part
class Remembers(TokenLoop):
    """Plain decoding that notes which prompts it has seen since it was told to forget."""

    inner: TokenLoop
    seen: list
    calls: list  # (number of the prompt, whether it was seen before)

    def __call__(self, model, state, ids, choose, limit):
        self.calls.append((choose.seed, tuple(ids) in self.seen))
        self.seen.append(tuple(ids))
        return self.inner(model, state, ids, choose, limit)

    def forget(self):
        self.seen.clear()


def test_every_round_has_new_prompts_and_then_the_same_again():
    lm, calls = endless(), []
    remembers = replace(lm, decode=Remembers(lm.decode, [], calls))
    one = Measured(SAMPLED, [[1, 2], [3, 4]], 2)
    runners = [Runner(DENSE, lm), Runner(way("remembers", "prefix_cache", {}), remembers)]
    for runner in runners:
        one.count(runner)
    for _ in range(2):
        one.time(lambda: None)
    assert calls == 3 * [(0, False), (1, False), (0, True), (1, True)], "counted, then two rounds"
    both = (PLAIN, "remembers")
    for sums in one.rounds:
        assert list(sums) == [(name, seen) for seen in (False, True) for name in both]
        assert all(tokens == 4 for _, _, tokens in sums.values()), "of both prompts"


# What is measured --------------------------------------------------------------------------------


def test_prompts_are_the_beginnings_of_stories_or_pieces_of_a_text():
    lm = endless()
    stories, said = to_continue(lm, replace(PLAN, text=None))
    assert [len(ids) for ids in stories] == [20, 20] and stories[0] != stories[1]
    assert said == "2 held-out stories of grade full"
    pieces, said = to_continue(lm, PLAN)
    assert [len(ids) for ids in pieces] == [20, 20] and said == "2 pieces of pond.txt"
    short, said = to_continue(lm, replace(PLAN, text=Text("a pond", "a.txt")))
    assert len(short) == 1 and said == "1 piece of a.txt"


def test_method_that_does_not_fit_is_listed_with_the_reason(found):
    for sampling in (GREEDY, SAMPLED):
        one = row(found, "speculative none", sampling)
        assert one.figures is None and one.reason.startswith(
            "speculative cannot load its draft model"
        )
    assert "speculative none: speculative cannot load its draft model" in " ".join(
        str(found).split()
    )
    assert row(found, "block=0").reason.startswith("prefix_cache: block must be an integer")


def test_trouble_while_running_costs_the_methods_own_rows_only():
    @dataclass(frozen=True)
    class Broken(Way):
        def apply(self, lm, value=None):
            return replace(lm, decode=Fails())

    @part
    class Fails(TokenLoop):
        def __call__(self, model, state, ids, choose, limit):
            raise KeyError("a bug")
            yield

    plan = replace(PLAN, prompts=1, new=2, rounds=1)
    found = compared(Broken("broken", None, technique="speculative"), plan=plan)
    assert [bool(one.figures) for one in found.rows] == [True, False] * 2
    assert found.rows[1].reason.startswith("failed: KeyError: ")


def test_ctrl_c_keeps_the_rounds_that_are_finished(monkeypatch):
    calls, real = [], Measured.time

    def interrupted(self, tick):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        real(self, tick)

    monkeypatch.setattr(Measured, "time", interrupted)
    plan = replace(PLAN, prompts=1, new=2, rounds=3)
    stop = 4  # in the second round, after the greedy half
    found = compared(plan=plan)
    assert found.stopped and found.rounds == 1 and "after 1 of 3 rounds" in str(found)
    calls.clear()
    stop = 2
    with pytest.raises(KeyboardInterrupt):
        compared(plan=plan)


def test_plan_that_does_not_fit_is_refused():
    with pytest.raises(MinitxError, match="length and new together must be at most .* of 48; got"):
        compared(plan=replace(PLAN, length=40))
    with pytest.raises(MinitxError, match="rounds must be an integer, at least 1; got 0"):
        compared(plan=replace(PLAN, rounds=0))
    with pytest.raises(MinitxError, match="no tokenizer"):
        compare_decoding(replace(endless(), tokenizer=None), METHODS, PLAN, bar=False)
    with pytest.raises(MinitxError, match="no method 'lookahead_'"):
        compared(plan=replace(PLAN, methods=("lookahead_",)))


# Reports -----------------------------------------------------------------------------------------


def test_report_fits_100_columns_and_names_every_method(found):
    text = str(found)
    assert max(map(len, text.splitlines())) <= 100
    for one in found.rows:
        assert text.count(f"\n{one.method} ") + text.count(f"\n{one.method}:") >= 1, one.name
    assert text.count("\n  seen before") == 2 and " ".join(LEGEND.split())[:40] in text
    assert "Temperature 1; plain decoding: first token after" in text


def test_json_has_every_figure(found):
    said = json.loads(json.dumps(found.as_dict()))
    figures = next(r for r in said["rows"] if r["method"] == "speculative twin")["figures"]
    assert figures["tokens_per_call"] == pytest.approx(5)
    assert {"multiply_adds", "weight_bytes", "cache_bytes", "first", "speed", "same"} <= {*figures}
    assert said["plan"]["text"] == "pond.txt" and said["rounds"] == 2


def test_picture_names_every_method(found, tmp_path):
    found.picture(tmp_path / "a.svg")
    picture = (tmp_path / "a.svg").read_text("utf-8")
    assert all(f">{r.method}</text>" in picture for r in found.rows if r.figures and not r.seen), (
        "a method is missing in the legend"
    )


# The command -------------------------------------------------------------------------------------

WORDS = ("frontier", "decoding", "-m", "toy", "--text", "pond.txt", "--prompts", "1")
SMALL_PLAN = ("--length", "8", "--new", "4", "--rounds", "1")


def test_command_prints_tables_or_json(run, workdir, monkeypatch):
    monkeypatch.setattr(decoding_methods, "METHODS", (DENSE, SELF, CACHE))
    (workdir / "pond.txt").write_text(POND.content)
    status, out, err = run(*WORDS, *SMALL_PLAN, "--methods", "speculative", "--small", "x")
    assert status == 0 and "\nspeculative draft=self " in out and "prefix_cache" not in out
    assert err == "" and "Second model: x." in " ".join(out.split())
    status, out, _ = run(*WORDS, *SMALL_PLAN, "--methods", "plain", "--json")
    assert [r["method"] for r in json.loads(out)["rows"]] == ["plain"] * 2


@pytest.mark.parametrize(
    "words, message",
    [
        (["--length", "40", "--new", "40"], "at most the context of 48; got 40 and 40."),
        ([*SMALL_PLAN, "--methods", "big"], "There is no method 'big'; expected one of plain,"),
        (["--share", "0.5"], "There is no option --share"),
        (["--grade", "full"], "--grade has no effect here"),
        (["--rounds", "0"], "--rounds: expected a number from 1"),
    ],
)
def test_command_refuses_in_one_sentence(run, workdir, words, message):
    (workdir / "pond.txt").write_text(POND.content)
    status, out, err = run(*WORDS, *words)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1


def test_python_function_compares_the_family(monkeypatch):
    from minitx.lab.frontier import frontier

    monkeypatch.setattr(decoding_methods, "METHODS", (DENSE, CACHE))
    plan = replace(PLAN, prompts=1, new=2, rounds=1)
    found = frontier(endless(), "decoding", bar=False, **vars(plan))
    assert [one.name for one in found.rows[:3]] == [PLAIN, CACHE.name, f"{CACHE.name}, seen before"]
    assert isinstance(found, decoding.Decoding)
