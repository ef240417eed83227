"""The answer cache: what is served, what is stored, and that the model does not run for a hit. The
key: tests/shared/test_answer_key.py; the file: tests/shared/test_answer_store.py."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
from literal_answer_cache import Answers
from literal_answer_cache import normalized as literal_normalized
from tiny import END, FAMILIES, ScriptedLoop, decode, tiny_lm, tiny_model

import minitx
from minitx import ledger
from minitx.checkpoints.precomputed import Origin, write_precomputed
from minitx.decode import Sampler
from minitx.errors import MinitxError, MinitxWarning
from minitx.shared.answer_store import ROW, statistics
from minitx.skip.answer_cache import NormalizedText, normalized
from minitx.technique import apply, find, wrap
from minitx.tree import Part, part

IDS = np.random.default_rng(0).integers(0, 256, 40).tolist()
EVENTS = ("exact hits", "normalized hits", "misses", "bypassed")


def cached(lm=None, **options) -> minitx.LM:
    dense = tiny_lm(dtype=np.float64) if lm is None else lm
    return apply(dense, {"answer_cache": {"file": "memory"} | options})


def ask(lm, prompt, n=6, **options):
    """The answer, how it was found, and the model's multiply-adds."""
    with ledger.counting(lm) as counts:
        found = lm.generate(prompt, n, **options)
    how = [event for event in EVENTS for _ in range(counts.events[event])]
    return found, how[0] if len(how) == 1 else how, counts.total().multiply_adds


def scripted(*rows, **options):
    """An answer cache around a loop that yields these tokens (one list for each row)."""
    calls = []
    lm = tiny_lm(decode=ScriptedLoop(tuple(map(tuple, rows)), calls))
    return cached(lm, **options), calls


# What is served ----------------------------------------------------------------------------------


def test_second_request_is_answered_without_the_model():
    """Three requests: a, b, a again. The third runs no product of the model at all."""
    lm, dense = cached(), tiny_lm(dtype=np.float64)
    a, how, work = ask(lm, IDS[:12])
    assert (a, how) == (dense.generate(IDS[:12], 6), "misses") and work > 0
    b, how, _ = ask(lm, IDS[1:13])
    assert (b, how) == (dense.generate(IDS[1:13], 6), "misses")
    assert ask(lm, IDS[:12]) == (a, "exact hits", 0), "the model ran for an answer that is stored"


@pytest.mark.parametrize("family", FAMILIES)
def test_hit_equals_generation_for_many_prompts_and_settings(family):
    dense = tiny_lm(family, dtype=np.float64)
    lm, rng = cached(dense), np.random.default_rng(1)
    settings = [
        {},
        {"temperature": 0.8, "seed": 3},
        {"seed": 4},
        {"top_k": 5, "seed": 3},
        {"top_p": 0.5, "seed": 3},
    ]
    cases = [
        (rng.integers(0, 256, rng.integers(1, 20)).tolist(), int(rng.integers(1, 12)), s)
        for s in settings * 4
    ]
    first = [dense.generate(prompt, n, **options) for prompt, n, options in cases]
    for expected in ("misses", "exact hits"):
        for answer, (prompt, n, options) in zip(first, cases):
            found, how, work = ask(lm, prompt, n, **options)
            assert (found, how) == (answer, expected), f"{n} tokens, {options}"
            assert (work == 0) == (how == "exact hits")


def test_requests_are_told_apart_as_by_the_literal_version():
    """Few prompts, limits and seeds in random order, with room for some of the answers."""
    rng, dense = np.random.default_rng(2), tiny_lm(dtype=np.float64)
    room = 7 * ROW
    lm, literal, hits = cached(dense, megabytes=room / 1e6), Answers(room, ROW), 0
    for _ in range(100):
        prompt, n = IDS[: rng.integers(3, 6)], int(rng.integers(1, 3))
        seed = [None, 1][rng.integers(2)]
        request = (tuple(prompt), n, seed)
        known = literal.find(request)
        found, how, _ = ask(lm, prompt, n, seed=seed)
        assert how == ("misses" if known is None else "exact hits"), request
        if known is None:
            known = dense.generate(prompt, n, seed=seed)
            literal.put(request, [b for token in known for b in [token] * 4])  # 4 bytes each
        else:
            known, hits = known[::4], hits + 1
        assert found == known
    assert 20 < hits < 80


def test_without_a_seed_nothing_is_kept():
    """Two samples of one request should differ, so neither is stored nor served."""
    lm = cached()
    found = [ask(lm, IDS[:5], 20, temperature=5.0) for _ in range(3)]
    assert [how for _, how, _ in found] == ["bypassed"] * 3
    assert len({tuple(answer) for answer, _, _ in found}) == 3
    assert ask(lm, IDS[:5], 20, temperature=5.0, seed=1)[1] == "misses"


def test_sampler_that_has_drawn_already_is_bypassed():
    """The second text of one sampler is drawn with later numbers than the first."""
    lm, dense = cached(), tiny_lm(dtype=np.float64)
    texts = []
    for one in (dense, lm, lm):
        choose = Sampler(temperature=5.0, seed=1)
        texts.append([[*decode(one.decode, one.model, IDS[:5], choose, 9)] for _ in range(2)])
    assert texts[1] == texts[0] and texts[0][0] != texts[0][1]
    assert texts[2][0] == texts[0][0]


def test_warm_state_is_served_too():
    lm = cached()
    answer = lm.generate(IDS[:12], 6)
    state = lm.model.new_state()
    lm.model(IDS[:7], state)
    with ledger.counting(lm) as counts:
        assert [*lm.decode(lm.model, state, IDS[:12], Sampler(), 6)] == answer
    assert counts.total().multiply_adds == 0 and state.position == 7


@part
class Steps(Part):
    """Decides by the tokens of a step together."""

    inner: Part
    decides: str

    def __call__(self, x, layer):
        return self.inner(x, layer)


@pytest.mark.parametrize("way, same", [("token", True), ("step", False), ("sequence", False)])
def test_where_steps_matter_a_warm_state_is_another_request(way, same):
    """A prompt whose beginning was run before may be answered differently then."""
    lm = cached(wrap(tiny_lm(dtype=np.float64), "attn", lambda attn, index: Steps(attn, way)))
    lm.generate(IDS[:12], 6)
    state = lm.model.new_state()
    lm.model(IDS[:7], state)
    with ledger.counting(lm) as counts:
        assert len([*lm.decode(lm.model, state, IDS[:12], Sampler(), 6)]) == 6
    assert counts.events["exact hits"] == same and counts.events["misses"] != same


# What is stored ----------------------------------------------------------------------------------


def test_answer_is_complete_at_the_end_of_the_text_or_at_the_limit():
    """Of 1 2 3 E 4 5: with limit 3, 1 2 3 is stored; with limit 6, 1 2 3 E."""
    lm, calls = scripted([1, 2, 3, END, 4, 5])
    for limit, answer in ((3, [1, 2, 3]), (6, [1, 2, 3])):
        assert lm.generate(IDS[:4], limit) == answer
        before = len(calls)
        assert ask(lm, IDS[:4], limit)[:2] == (answer, "exact hits") and len(calls) == before


def test_caller_that_goes_on_after_the_end_of_a_text_gets_all_of_it():
    lm, calls = scripted([1, 2, 3, END, 4, 5])
    lm.generate(IDS[:4], 6)  # 1 2 3 E is stored
    whole = [*decode(lm.decode, lm.model, IDS[:4], Sampler(), 6)]
    assert whole == [1, 2, 3, END, 4, 5], "the model goes on where the stored answer ends"
    before = len(calls)
    assert [*decode(lm.decode, lm.model, IDS[:4], Sampler(), 6)] == whole
    assert len(calls) == before, "now all of it is stored"
    assert lm.generate(IDS[:4], 6) == [1, 2, 3] and len(calls) == before


def test_answer_whose_caller_stopped_is_not_stored():
    lm, _ = scripted([1, 2, 3, 4])
    tokens = decode(lm.decode, lm.model, IDS[:4], Sampler(), 4)
    assert [next(tokens), next(tokens), next(tokens)] == [1, 2, 3]
    tokens.close()
    assert ask(lm, IDS[:4], 4)[1] == "misses"


def test_answer_is_stored_before_its_last_token_is_yielded():
    """A caller that wants n tokens may take n and never come back."""
    lm, _ = scripted([1, 2, 3, 4])
    tokens = decode(lm.decode, lm.model, IDS[:4], Sampler(), 4)
    assert [next(tokens) for _ in range(4)] == [1, 2, 3, 4]
    assert ask(lm, IDS[:4], 4)[1] == "exact hits"


@part
class Failing(ScriptedLoop):
    def __call__(self, model, state, prompt, choose, limit):
        yield 1
        raise FloatingPointError("overflow")


def test_answer_whose_generation_failed_is_not_stored():
    lm = cached(tiny_lm(decode=Failing((), [])))
    for _ in range(2):
        with pytest.raises(FloatingPointError):
            lm.generate(IDS[:4], 3)
    assert lm.decode.store.find(lm.decode.ask(lm.model, IDS[:4], Sampler(), 3).key) is None


def test_stored_ids_that_are_no_answer_are_not_served():
    """Whoever edits the file by hand: a token that the model does not have, a text without end."""
    lm = cached()
    key = lm.decode.ask(lm.model, IDS[:4], Sampler(), 6).key
    for ids in ([1, 2, 300, 4, 5, 6], [1, 2], []):
        lm.decode.store.put(key, ids)
        assert ask(lm, IDS[:4])[:2] == (tiny_lm(dtype=np.float64).generate(IDS[:4], 6), "misses")


# Batches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "below", [{}, {"padding_skip": {}}, {"prefix_cache": {"block": 2}}], ids=str
)
def test_batch_runs_only_the_prompts_that_are_not_stored(below):
    dense = tiny_lm(dtype=np.float64)
    lm = cached(apply(dense, below))
    prompts = [IDS[:9], IDS[3:7], IDS[5:16], IDS[8:20]]
    expected = [dense.generate(prompt, 6) for prompt in prompts]
    for row in (0, 2):
        lm.generate(prompts[row], 6)
    with ledger.counting(lm) as counts:
        assert lm.generate(prompts, 6) == expected
    assert (counts.events["exact hits"], counts.events["misses"]) == (2, 2)
    if "padding_skip" in below:
        assert counts.events["tokens run"] == 4 + 12 + 2 * 5, "the two others, packed"
    assert ask(lm, prompts) == (expected, ["exact hits"] * 4, 0)
    assert ask(lm, prompts[1])[1:] == ("exact hits", 0), "a row of a batch is stored as a prompt"


def test_row_of_a_batch_is_stored_up_to_its_end():
    """After its end a row may yield anything, here 7 7, which is no part of its answer."""
    lm, calls = scripted([1, END, 7, 7], [1, 2, 3, 4])
    assert lm.generate([IDS[:3], IDS[:5]], 4) == [[1], [1, 2, 3, 4]]
    key = lm.decode.ask(lm.model, IDS[:3], Sampler(), 4).key
    assert lm.decode.store.find(key) == [1, END]
    before = len(calls)
    assert lm.generate([IDS[:3], IDS[:5]], 4) == [[1], [1, 2, 3, 4]] and len(calls) == before


def test_batch_with_a_seed_keeps_each_rows_own_samples():
    lm, dense = cached(), tiny_lm(dtype=np.float64)
    prompts = [IDS[:9]] * 3
    expected = dense.generate(prompts, 12, temperature=3.0, seed=5)
    assert len({*map(tuple, expected)}) == 3
    for how in ("misses", "exact hits"):
        assert ask(lm, prompts, 12, temperature=3.0, seed=5)[:2] == (expected, [how] * 3)
    assert ask(lm, IDS[:9], 12, temperature=3.0, seed=6)[:2] == (expected[1], "exact hits")
    assert ask(lm, prompts[:2], 12, temperature=3.0)[1] == ["bypassed"] * 2


# Whose answers they are --------------------------------------------------------------------------


def test_another_model_or_loop_with_the_same_store_finds_nothing_of_this_one():
    lm = cached()
    lm.generate(IDS[:9], 6)
    others = {
        "weights": replace(lm, model=tiny_model(seed=2, dtype=np.float64)),
        "dtype": replace(lm, model=tiny_model()),
        "technique": apply(lm, {"early_exit": {"threshold": 0.5}}),
        "setting": apply(lm, {"early_exit": {"threshold": 0.5000001}}),
        "loop": replace(lm, decode=replace(lm.decode, inner=Failing((), []))),
    }
    for what, other in others.items():
        assert other.decode.store is lm.decode.store
        asked = other.decode.ask(other.model, IDS[:9], Sampler(), 6)
        assert other.decode.store.find(asked.key) is None, f"an answer of another {what}"
    same = replace(lm, model=tiny_model(dtype=np.float64, seed=1))
    assert ask(same, IDS[:9])[1] == "exact hits", "equal weights are the same model"


def test_second_model_of_the_inner_loop_belongs_to_the_key():
    dense = tiny_lm(dtype=np.float64)
    one = cached(apply(dense, {"speculative": {"draft": "self"}}))
    draft = replace(one.decode.inner.draft, model=tiny_model(seed=3, layers=1, dtype=np.float64))
    other = replace(one, decode=replace(one.decode, inner=replace(one.decode.inner, draft=draft)))
    keys = {
        lm.decode.ask(lm.model, IDS[:9], Sampler(), 6).key for lm in (dense_of(one), one, other)
    }
    assert len(keys) == 3


def dense_of(lm):
    """The same with the plain loop inside."""
    return replace(lm, decode=replace(lm.decode, inner=tiny_lm().decode))


@pytest.mark.parametrize(
    "below",
    [
        {"speculative": {"draft": "self"}},
        {"prefix_cache": {"block": 2}},
        {"speculative": {"draft": "self"}, "prefix_cache": {"block": 2}},
        {"heavy_hitters": {"recent": 4, "heavy": 2}},
    ],
    ids=lambda below: "+".join(below),
)
def test_it_goes_around_other_techniques(below):
    inner = apply(tiny_lm(dtype=np.float64), below)
    lm = cached(inner)
    for how in ("misses", "exact hits"):
        for prompt in (IDS[:9], IDS[:14]):
            assert ask(lm, prompt, 12)[:2] == (inner.generate(prompt, 12), how)


# The store of a model ----------------------------------------------------------------------------


def test_answers_outlive_the_model_that_gave_them(tmp_path):
    file = str(tmp_path / "a.sqlite")
    answer = cached(file=file).generate(IDS[:9], 6)
    assert ask(cached(file=file), IDS[:9]) == (answer, "exact hits", 0)
    assert statistics(file).answers == 1


def test_forget_leaves_the_file_and_goes_on_in_memory(tmp_path):
    file = str(tmp_path / "a.sqlite")
    lm = cached(file=file)
    lm.generate(IDS[:9], 6)
    lm.decode.store.forget()
    assert ask(lm, IDS[:9])[1] == "misses" and ask(lm, IDS[:9])[1] == "exact hits"
    lm.generate(IDS[:10], 6)
    assert statistics(file).answers == 1, "what is measured is kept out of the file"
    assert ask(cached(file=file), IDS[:9])[1] == "exact hits"


def test_copies_and_pickles_find_the_same_answers(tmp_path):
    lm = cached(tiny_lm(tokenizer=None), file=str(tmp_path / "a.sqlite"))
    answer = lm.generate(IDS[:9], 6)
    for other in (copy.copy(lm), copy.deepcopy(lm), pickle.loads(pickle.dumps(lm))):
        assert ask(other, IDS[:9])[:2] == (answer, "exact hits")


def test_precomputed_folder_uses_the_same_file(tmp_path):
    """Reading the folder runs a short text, which is no answer to be kept."""
    file = str(tmp_path / "a.sqlite")
    lm = cached(tiny_lm(), file=file, normalize=True)
    answer = lm.generate(IDS[:9], 6)
    write_precomputed(lm, tmp_path / "out", Origin("toy", "--answer-cache"), None)
    again = minitx.load(tmp_path / "out")
    assert repr(again.decode) == repr(lm.decode) and statistics(file).answers == 1
    assert ask(again, IDS[:9]) == (answer, "exact hits", 0)


@pytest.mark.parametrize("what", ["a folder", "a text", "a link to nothing", "no folder"])
def test_file_that_cannot_hold_answers_is_refused_before_any_work(tmp_path, what):
    path = tmp_path / "x"
    if what == "a folder":
        path.mkdir()
    elif what == "a text":
        path.write_text("Once upon a time, there was a text of more than one hundred bytes. " * 3)
    elif what == "a link to nothing":
        path.symlink_to(tmp_path / "nothing")
    else:
        path = path / "y"
    with pytest.raises(MinitxError, match="^answer_cache: .*x") as caught:
        cached(file=str(path))
    assert "\n" not in str(caught.value) and not (tmp_path / "nothing").exists()


def test_full_disk_costs_one_warning_and_no_answer():
    lm, dense = cached(), tiny_lm(dtype=np.float64)
    lm.generate(IDS[:9], 6)
    store = lm.decode.store
    store.database.open.connection.execute("PRAGMA max_page_count = 1")  # no room for more
    with pytest.warns(MinitxWarning, match="full.*answers are not kept") as said:
        for n in range(100):
            store.put(bytes([n] * 32), [n] * 100)
    assert len(said) == 1
    for _ in range(2):
        assert ask(lm, IDS[:4], 40)[:2] == (dense.generate(IDS[:4], 40), "misses")
    assert ask(lm, IDS[:9])[1] == "exact hits", "what was stored is served"


# The normalized tier -----------------------------------------------------------------------------


def test_normalized_prompts_share_an_answer_only_if_asked_for():
    plain, lm = cached(), cached(normalize=True)
    for one in (plain, lm):
        one.generate("Once upon", 6)
    same = ["once  upon", " ONCE UPON ", "Once\tupon"]
    answer = lm.generate("Once upon", 6)
    for prompt in same:
        assert ask(plain, prompt)[1] == "misses", "by default only the same tokens are a hit"
        assert ask(lm, prompt) == (answer, "normalized hits", 0)
    assert ask(lm, "Once upon")[1] == "exact hits" and ask(lm, "Onceupon")[1] == "misses"
    assert ask(lm, "once upon", 5)[:2] == (
        answer[:1] and lm.generate("once upon", 5),
        "normalized hits",
    )


def test_normalized_hit_with_another_limit_is_cut_or_is_a_miss():
    """Stored: 6 tokens without an end. 4 of them are an answer to whoever wants 4, not 8."""
    lm, _ = scripted([1, 2, 3, 4, 5, 6, 7, 8], normalize=True)
    lm.generate("ab", 6)
    assert ask(lm, "AB", 4)[:2] == ("\x01\x02\x03\x04", "normalized hits")
    assert ask(lm, "AB", 8)[1] == "misses"


def test_normalized_tier_keeps_other_settings_apart():
    lm = cached(normalize=True)
    lm.generate("Once", 6, seed=1)
    assert ask(lm, "once", 6, seed=2)[1] == "misses"
    assert ask(lm, "ONCE", 6, temperature=0.5, seed=1)[1] == "misses"
    assert ask(lm, "oNCE", 6, seed=1)[1] == "normalized hits"


def test_normalized_text_is_that_of_the_literal_version():
    rng = np.random.default_rng(3)
    text = NormalizedText.of(tiny_lm())
    for _ in range(50):
        prompt = bytes(rng.choice([*b"aAbBzZ@[ \t\n0."], 12).tolist()).decode()
        assert normalized(prompt) == literal_normalized(prompt)
        assert text(tiny_lm().encode(prompt)[1:]) == literal_normalized(prompt)
    assert normalized("Cafe\u0301") == normalized("caf\u00e9") != normalized("cafe")
    assert normalized("STRASSE") == normalized("stra\u00dfe")
    assert text([200]) != text([201]), "bytes that are no UTF-8 stay different"


def test_normalize_needs_a_tokenizer():
    with pytest.raises(MinitxError, match="^answer_cache needs a tokenizer"):
        cached(tiny_lm(tokenizer=None), normalize=True)


# What it costs -----------------------------------------------------------------------------------


def test_answer_takes_4_bytes_per_token_and_250(tmp_path):
    lm = cached(file=str(tmp_path / "a.sqlite"))
    lm.generate(IDS[:9], 6)
    lm.generate(IDS[:9], 11)
    assert statistics(lm.decode.store.file).bytes == 2 * 250 + 4 * (6 + 11)


def test_neutral_keeps_the_plain_loop():
    assert repr(cached(megabytes=0.0)) == repr(tiny_lm())


class Unfit:
    """Neither plain values nor a dataclass."""


@part
class Odd(Part):
    inner: Part
    value: object

    def __call__(self, *args):
        return self.inner(*args)

    batch = None


def test_loop_that_cannot_be_identified_is_refused_in_a_sentence():
    lm = cached(tiny_lm(decode=Odd(tiny_lm().decode, Unfit())))
    with pytest.raises(MinitxError, match="Unfit cannot be told from others"):
        lm.generate(IDS[:4], 3)


def test_calibration_of_others_leaves_the_file_alone(tmp_path):
    """A cascade that is put around the cache later (both at once are put the other way round) reads
    stories to calibrate: none of its answers is stored, and the cache works on."""
    file = tmp_path / "a.sqlite"
    lm = cached(file=str(file))
    answer = lm.generate(IDS[:9], 6)
    late = apply(lm, {"cascade": {"small": "self", "budget": 1.5, "stories": 1, "cuts": 2}})
    assert statistics(file).answers == 1, "calibration answers were stored"
    assert ask(lm, IDS[:9]) == (answer, "exact hits", 0), "the cache was emptied"
    assert late.decode.inner.store is lm.decode.store


@pytest.mark.parametrize("other", ["cascade", "majority_vote", "router"])
def test_cache_is_outside_of_what_answers(other):
    """So the answer that is served is the one that is stored, and calibration does not see it."""
    demo = find(other).demo
    lm = apply(tiny_lm(), {other: demo, "answer_cache": {"file": "memory"}})
    assert type(lm.decode).__name__ == "AnswerCache" and decoded_by(lm) == 1
    assert decoded_by(lm) == 0, "an answer was generated twice"


def decoded_by(lm) -> int:
    """How many requests of two were not answered from the cache."""
    with ledger.counting(lm) as counts:
        assert lm.generate(IDS[:5], 3) == lm.generate(IDS[:5], 3)
    return counts.events["misses"]
