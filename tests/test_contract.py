"""What every technique has to satisfy: alone, in pairs and in triples.

On small random models of three families and a skipless one. Where a technique refuses a family it
says so in one sentence, and each of its settings fits one family at least. The settings are
*neutral* (nothing changes), *default*, *demo*, at which it provably acts here, and its presets.
"""

import hashlib
import itertools
import random
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from enumeration import exact_distribution, model_distribution, total_variation
from random_sets import MODELS, broken_law, draw_case, try_case
from same import assert_same
from tiny import END, FAMILIES, KINDS, WIDE, decode, tiny_lm, tiny_model

from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.lm import LM
from minitx.memory_layout import large_matrices, to_column_major
from minitx.technique import (
    HEADINGS,
    LEVELS,
    _check_rows,
    apply,
    decides,
    in_order,
    names,
    techniques,
)
from minitx.tree import walk, weights

# Of checks that cost more than they save on models as small as these: each setting has to run.
pytestmark = pytest.mark.filterwarnings("ignore::minitx.errors.MinitxWarning")

ROOT = Path(__file__).parent.parent
ALL = {t.name: t for t in techniques()}
IDS = np.random.default_rng(0).integers(0, 258, 40)
PROMPT, NEW = IDS[:12].tolist(), 16
# As generation runs a text: the prompt at once, then token by token; last, many tokens at once.
STEPS = (12, *[1] * 16, 12)
FEW = 2  # calibration stories: the laws are the same after many


def settings(t) -> dict[str, dict]:
    """The different settings of a technique, by name."""
    found = {"neutral": t.neutral, "default": {}, "demo": t.demo}
    if t.neutral is None:
        del found["neutral"]
    if t.demo == {}:
        del found["default"]
    found |= {f"preset={name}": {"preset": name} for name in t.presets}
    few = {"stories": FEW} if "stories" in t.options and t.options["stories"].default > FEW else {}
    return {setting: few | options for setting, options in found.items()}


def options_of(name: str, setting: str) -> dict:
    """The options of a setting; those of the default if there is no such setting."""
    found = settings(ALL[name])
    return found[setting] if setting in found else found.get("default", {})


@cache
def dense_lm(family: str, dtype) -> LM:
    """A tiny model, or the one with large matrices."""
    if family == "large":
        return to_column_major(tiny_lm(model=tiny_model("llama", dtype=dtype, **WIDE)))
    return tiny_lm(family, dtype=dtype)


@cache
def _changed(name: str, family: str, setting: str, dtype):
    dense = dense_lm(family, dtype)
    try:
        return apply(dense, {name: options_of(name, setting)})
    except MinitxError as error:
        return error


def changed(name, family, setting="demo", dtype=np.float64) -> LM:
    """The tiny model with the technique; skips a family that is refused in one sentence."""
    found = _changed(name, family, setting, dtype)
    if isinstance(found, MinitxError):
        assert name in str(found) and "\n" not in str(found), f"unclear refusal: {found}"
        pytest.skip(str(found))
    return found


def run(lm, ids, sizes, state=None) -> np.ndarray:
    """Logits of the ids, fed in steps of these sizes."""
    state = lm.model.new_state() if state is None else state
    ends = np.cumsum([0, *sizes])
    return np.concatenate([lm.model(ids[a:b], state) for a, b in itertools.pairwise(ends)])


@cache
def once(name, family, setting="demo") -> np.ndarray:
    """Logits of IDS in STEPS: what other ways to run them are compared with."""
    return run(changed(name, family, setting), IDS, STEPS)


def greedy(lm, prompt, n=NEW):
    """``n`` greedy tokens, past the end of a text too."""
    from minitx.decode import Sampler

    return list(decode(lm.decode, lm.model, prompt, Sampler(), n))


LOGITS = ("token", "vocabulary entry")


def close(found, expected, within, what):
    assert_same(found, expected, f"logits, {what}", LOGITS, within)


each = pytest.mark.parametrize("name", ALL)
family = pytest.mark.parametrize("family", KINDS)
each_setting = pytest.mark.parametrize(
    "name, setting", [(t.name, setting) for t in ALL.values() for setting in settings(t)]
)
LOOPS = [t.name for t in ALL.values() if t.level in ("decode", "answer")]
inner = pytest.mark.parametrize("name", [name for name in ALL if name not in LOOPS])
loops = pytest.mark.parametrize("name", LOOPS)
other_loops = pytest.mark.parametrize("name", [name for name in LOOPS if not ALL[name].exact])


# One technique -----------------------------------------------------------------------------------


@each_setting
def test_each_setting_fits_a_family(name, setting):
    refusals = [_changed(name, family, setting, np.float64) for family in KINDS]
    assert not all(isinstance(found, MinitxError) for found in refusals), refusals[0]


@each
@family
def test_demo_setting_acts(name, family):
    t, dense, lm = ALL[name], tiny_lm(family, dtype=np.float64), changed(name, family)
    if t.event is not None:
        with counting(lm) as counts:  # twice, for what acts on a prompt that has come by before
            assert greedy(lm, PROMPT) == greedy(lm, PROMPT)
            lm.generate([PROMPT, PROMPT[:5]], 2)  # and a ragged batch
        assert t.acted(counts.events), f"{name} did nothing: {dict(counts.events)}"
    elif t.exact:
        assert repr(lm.model) != repr(dense.model) or repr(lm.decode) != repr(dense.decode)
    else:
        error = abs(run(lm, IDS, STEPS) - run(dense, IDS, STEPS)).max()
        assert error > 1e-6, "the logits are the dense ones"


@each
@family
def test_neutral_setting_equals_dense(name, family):
    if ALL[name].neutral is None:
        pytest.skip("it has no neutral setting")
    dense, lm = tiny_lm(family), changed(name, family, "neutral", np.float32)
    for sizes in ((40,), (7, 20, 13)):
        what = f"neutral setting equals dense bit for bit, in steps of {sizes}"
        assert_same(run(lm, IDS, sizes), run(dense, IDS, sizes), what, LOGITS)
    assert greedy(lm, PROMPT) == greedy(dense, PROMPT)


@pytest.mark.parametrize("name", [t.name for t in ALL.values() if t.exact])
@family
@pytest.mark.parametrize("dtype, within", [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_exact_technique_equals_dense_up_to_rounding(name, family, dtype, within):
    dense, lm = tiny_lm(family, dtype=dtype), changed(name, family, "demo", dtype)
    close(lm.logits(IDS), dense.logits(IDS), within, "exact technique")
    assert greedy(lm, PROMPT) == greedy(dense, PROMPT), "the greedy text is another one"


@pytest.mark.parametrize(
    "name, setting",
    [(name, s) for name in ALL if name not in LOOPS for s in settings(ALL[name]) if s != "neutral"],
)
@family
def test_prefill_chunks_and_single_tokens_agree(name, setting, family):
    """Or, where decisions depend on the step: the same steps give the same, and a step does not
    depend on later ones. Where only the prompt decides, it may be followed by any steps."""
    lm, first, other = changed(name, family, setting), once(name, family, setting), IDS.copy()
    if decides(lm.model) == "token":
        close(lm.logits(IDS), first, 1e-10, "in one pass")
        for sizes in ((40,), (7, 20, 13), (*(1,) * 6, 34)):
            close(run(lm, IDS, sizes), first, 1e-10, f"in steps of {sizes}")
        return
    if decides(lm.model) == "sequence":
        for sizes in ((12, 28), (12, 5, 20, 3)):
            close(run(lm, IDS, sizes), first, 1e-10, f"in steps of {sizes}")
    other[28:] = (other[28:] + 1) % 258
    np.testing.assert_array_equal(run(lm, other, STEPS)[:28], first[:28])


@inner
@family
def test_rewind_and_replay_gives_same_logits(name, family):
    """Back to where the last step began, always; further back bit for bit, or refused by name."""
    lm, first = changed(name, family), once(name, family)
    begun = lm.model.new_state()
    run(lm, IDS[:24], STEPS[:13], begun)
    for back_to, end in ((24, 28), (23, 28), (17, 26), (0, 20)):
        state = begun if back_to == 0 else begun.fork()
        lm.model((IDS[:8] + 1) % 258, state)  # something else, to be forgotten
        state.rewind(24)
        try:
            state.rewind(back_to)
        except MinitxError as error:
            assert 0 < back_to < 24 and name in str(error) and "\n" not in str(error)
            back_to = 24
        steps = STEPS[: end - 11] if back_to == 0 else (1,) * (end - back_to)
        again = run(lm, IDS[back_to:end], steps, state)
        assert_same(again, first[back_to:end], f"logits replayed from {back_to}", LOGITS)


@inner
@family
def test_fork_is_independent(name, family):
    lm, first = changed(name, family), once(name, family)
    state = lm.model.new_state()
    run(lm, IDS[:20], STEPS[:9], state)
    fork = state.fork()
    run(lm, (IDS[20:26] + 1) % 258, (1,) * 6, fork)  # must not be seen by the other
    found = run(lm, IDS[20:], STEPS[9:], state)
    np.testing.assert_array_equal(found, first[20:], "the original was changed by its fork")
    fork = state.fork()
    expected = run(lm, IDS[:3], (1,) * 3, state)
    found = run(lm, IDS[:3], (1,) * 3, fork)
    assert_same(found, expected, "a fork goes on like its original", LOGITS)


@inner
@family
def test_two_interleaved_sequences_are_independent(name, family):
    lm, texts = changed(name, family), (IDS, (IDS * 7 + 3) % 258)
    states, found = (lm.model.new_state(), lm.model.new_state()), ([], [])
    for which in [0, 1, 1, 0] * 5:
        t = sum(map(len, found[which]))
        ids = texts[which][t : t + (1 if t else 12)]  # first the prompt
        found[which].append(lm.model(ids, states[which]))
    alone = once(name, family)[:21], run(lm, texts[1][:21], STEPS[:10])
    for mixed, expected in zip(found, alone):
        np.testing.assert_array_equal(np.concatenate(mixed), expected, "the other was seen")


@each
@family
def test_ragged_batch_row_equals_row_alone(name, family):
    lm = changed(name, family)
    prompts = [PROMPT, IDS[20:23].tolist(), IDS[30:37].tolist()]
    assert lm.generate(prompts, 8) == [lm.generate(prompt, 8) for prompt in prompts]


@pytest.mark.parametrize(
    "name, setting",
    [(t.name, s) for t in ALL.values() for s in ("neutral", "demo") if s in settings(t)],
)
def test_setting_keeps_the_laws_with_large_matrices(name, setting):
    """Large matrices are column-major, and products with them may be: their rows are not
    contiguous, and sums round in another order."""
    lm = changed(name, "large", setting)
    assert all(w.flags.f_contiguous for w in large_matrices(lm).values())
    if setting == "neutral":
        dense, lm = dense_lm("large", np.float32), changed(name, "large", setting, np.float32)
        found, expected = run(lm, IDS, (12, 1, 1, 26)), run(dense, IDS, (12, 1, 1, 26))
        assert_same(found, expected, "neutral setting equals dense bit for bit", LOGITS)
        return
    if wrong := broken_law(lm, IDS[:16], prompt=6, new=4):
        pytest.fail(wrong)
    if ALL[name].exact:
        expected = dense_lm("large", np.float64).logits(IDS)
        close(lm.logits(IDS), expected, 1e-12, "exact technique")


@each
@family
def test_dense_model_is_unchanged(name, family):
    lm = tiny_lm(family)
    drawn = repr(lm)

    def prints():
        return {path: hashlib.sha256(w).hexdigest() for path, w in weights(lm).items()}

    before = prints()
    try:
        found = apply(lm, {name: options_of(name, "demo")})
    except MinitxError as error:
        pytest.skip(str(error))
    found.generate(PROMPT, 10)
    assert prints() == before and repr(lm) == drawn
    assert repr(found) != drawn  # what runs is what is printed


@each
@family
def test_dtype_stays_float32(name, family):
    lm = changed(name, family, "demo", np.float32)
    assert lm.logits(IDS).dtype == np.float32
    state = lm.model.new_state()
    for ids in (IDS[:9], IDS[9:10]):
        assert lm.model(ids, state).dtype == np.float32
    for layer in state.layers:
        for kept in (layer.keys, layer.values):  # or integers that stand for floats
            assert kept is None or kept.dtype == np.float32 or kept.dtype.kind in "iu"
    for path, node in walk(lm):
        for field, value in vars(node).items():
            if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                assert value.dtype == np.float32, f"{path}.{field}"


# What is declared --------------------------------------------------------------------------------


@each
def test_card_is_complete(name):
    t, card = ALL[name], ALL[name].card
    assert card.summary.endswith(".") and "\n" not in card.summary
    found = tuple(h for h in card.sections if h != "Tutorial")
    assert found == HEADINGS[:-1]
    assert all(card.sections.values())
    fidelity = card.sections["Fidelity"]
    kinds = ("paper's text", "authors' code", "reconstruction", "practice", "our own", "ours")
    assert any(kind in fidelity for kind in kinds), (
        f"Fidelity says nothing of the source: {fidelity}"
    )
    assert t.exact == card.sections["Kind"].lower().startswith("exact")
    assert t.level in LEVELS


@each
def test_card_names_its_test_its_literal_version_and_its_tutorial(name):
    t, card = ALL[name], ALL[name].card
    folder = f"tests/{t.function.__module__.split('.')[1]}"
    proof = card.sections["Proof"]
    for path in (f"{folder}/test_{name}.py", f"{folder}/literal_{name}.py"):
        assert path in proof.split() or f"{path};" in proof.split(), (
            f"the card does not name {path}"
        )
        assert (ROOT / path).exists(), path
    own = [path.name for path in (ROOT / folder).glob(f"test_{name}*.py")]
    others = {f"test_{other}.py" for other in ALL}
    assert set(own) - others == set(), f"{name} has more than one test file: {own}"
    assert (ROOT / t.path).exists(), t.path
    if "Tutorial" in card.sections:
        path = ROOT / card.sections["Tutorial"]
        assert path.exists() and name.replace("_", "") in path.read_text("utf-8").replace("_", "")


@each
def test_options_are_declared_and_defaults_are_valid(name):
    t = ALL[name]
    for option in t.options.values():
        assert option.meaning, f"option {option.name} of {name} is not explained"
        assert len(option.name) > 1 or name == "elsa", f"option {option.name} is not a word"
        assert option.check(option.default) == option.default
        if option.default is not None:
            assert option.check(option.read(str(option.default))) == option.default
    assert t.checked(t.neutral or {}) == (t.neutral or {})
    assert t.checked(t.demo) == t.demo
    assert t.exact or t.neutral is not None
    assert t.event is not None or t.level not in ("scores", "stack", "head", "decode", "answer")


@each
def test_presets_are_words_and_valid_options(name):
    t = ALL[name]
    assert "preset" not in t.options, "the word preset=NAME names a preset"
    for preset, options in t.presets.items():
        assert re.fullmatch(r"[a-z][a-z0-9-]*", preset) and preset != "default", preset
        assert t.checked(options) == options == t.checked({"preset": preset})


@each
def test_after_names_techniques_of_the_same_level(name):
    for other in ALL[name].after:
        assert ALL[other].level == ALL[name].level


def test_file_and_technique_have_the_same_name():
    assert set(ALL) == set(names())
    assert {t.name: t.function.__module__ for t in ALL.values()} == names()


# Pairs and triples -------------------------------------------------------------------------------


@cache
def refused_alone(name, setting, family, layers) -> bool:
    try:
        apply(tiny_dense(family, layers), {name: options_of(name, setting)})
    except MinitxError:
        return True
    return False


@cache
def tiny_dense(family, layers=2) -> LM:
    return tiny_lm(model=tiny_model(family, dtype=np.float64, layers=layers))


def together(chosen, setting, family, layers=2):
    """The tiny model with all of these at a setting, or None if that is refused: a refusal names
    one of each two that do not fit, and what is refused alone is not counted as a pair."""
    if any(refused_alone(name, setting, family, layers) for name in chosen):
        return None
    try:
        wanted = {name: options_of(name, setting) for name in chosen}
        return apply(tiny_dense(family, layers), wanted)
    except MinitxError as error:
        named = [name for name in chosen if name in str(error)]
        assert len(named) >= 2 and "\n" not in str(error), f"a refusal names both: {error}"
        return None


PAIRS = list(itertools.combinations(ALL, 2))


@cache
def dense_logits(family) -> np.ndarray:
    return tiny_dense(family).logits(IDS)


def families_of(number: int) -> list[str]:
    """The families in an order that differs from pair to pair, so that each gets a third of the
    pairs: a pair is tried on the first that does not refuse it."""
    start = number % len(FAMILIES)
    families = [*FAMILIES][start:] + [*FAMILIES][:start]
    return [*families, "skipless"]


@each
def test_pairs_at_neutral_equal_dense_or_are_refused(name):
    """The pairs of a technique and each that comes after it."""
    for number, pair in enumerate(PAIRS):
        if pair[0] == name:
            for family in families_of(number):
                both = together(pair, "neutral", family)
                if both is not None:
                    what = f"{' and '.join(pair)}, both neutral, on {family}"
                    close(both.logits(IDS), dense_logits(family), 1e-12, what)
                    break


EXACT = [t.name for t in ALL.values() if t.exact]
EXACT_PAIRS = list(itertools.combinations(EXACT, 2))


@family
def test_pair_of_exact_techniques_equals_dense(family):
    lm = tiny_dense(family)
    logits, text, tried = lm.logits(IDS), greedy(lm, PROMPT, 8), 0
    for pair in EXACT_PAIRS:
        both = together(pair, "demo", family)
        if both is not None:
            close(both.logits(IDS), logits, 1e-12, f"{' and '.join(pair)}")
            assert greedy(both, PROMPT, 8) == text, pair
            tried += 1
    assert tried >= (5 if family == "skipless" else 20)


@family
@pytest.mark.parametrize("reverse", [False, True])
def test_all_compatible_exact_techniques_together_equal_dense(family, reverse):
    lm, chosen = tiny_dense(family), ()
    for name in reversed(EXACT) if reverse else EXACT:
        if together((*chosen, name), "demo", family) is not None:
            chosen = (*chosen, name)
    assert len(chosen) >= (3 if family == "skipless" else 5)
    found = together(chosen, "demo", family)
    close(found.logits(IDS), lm.logits(IDS), 1e-12, " and ".join(chosen))
    assert greedy(found, PROMPT) == greedy(lm, PROMPT)


def sampled(count: int, size: int, seed: int) -> list:
    """``count`` different sets of ``size`` techniques with a family each, always the same."""
    draw = random.Random(seed)
    sets = list(itertools.combinations(ALL, size))
    return [(draw.choice(list(FAMILIES)), chosen) for chosen in draw.sample(sets, count)]


IN_ACTION = sampled(90, 2, 1) + sampled(90, 3, 2)
# One that leaves the other nothing to do: all logits are asked for when drafts are verified; of two
# FFNs one is left out, so that none comes after the other; of two layers one is not run; sub-layers
# that are dropped look nothing up and have no heads; votes, and answers of two models, are taken
# row by row.
IDLE = {
    "exact_head": {
        "big_little",
        "ensemble",
        "jacobi",
        "lookahead",
        "prompt_lookup",
        "self_speculative",
        "speculative",
    },
    "ffn_skip": {"layer_router", "layer_skip", "switchable"},
    "function_tables": {"layer_skip"},
    "head_cascade": {"layer_router", "layer_skip"},
    "layer_skip": {"layer_router", "switchable"},
    "mixture_of_depths": {"layer_router"},
    "negative_predict": {"layer_skip"},
    "negative_skip": {"layer_skip"},
    "padding_skip": {"cascade", "majority_vote", "router"},
    "perforate_positions": {"layer_skip"},
    "zero_skip": {"layer_skip"},
}


def layers_for(chosen) -> int:
    """Two; three if layer_merge makes one of two, so that two are left."""
    return 3 if "layer_merge" in chosen else 2


@cache
def in_action(family, chosen):
    """The model with all of these at their demo settings; None if that is refused."""
    return together(chosen, "demo", family, layers_for(chosen))


@pytest.mark.parametrize(
    "family, chosen", IN_ACTION, ids=[f"{f}-{'+'.join(c)}" for f, c in IN_ACTION]
)
def test_sampled_sets_at_demo_run_and_decode(family, chosen):
    """At the demo settings, approximate ones included, on a decode of 16 tokens."""
    lm, found = tiny_dense(family, layers_for(chosen)), in_action(family, chosen)
    if found is None:
        pytest.skip("refused")
    backwards = apply(lm, {name: options_of(name, "demo") for name in reversed(chosen)})
    assert repr(found) == repr(backwards), "the flags' order matters"
    prompts, new = [PROMPT, PROMPT, PROMPT[4:9]], 8
    with counting(found) as counts:
        text, batch = greedy(found, PROMPT), found.generate(prompts, new)
        short, alone = found.generate(PROMPT[4:9], new), found.generate(PROMPT, new)
    assert len(text) == NEW and text == greedy(found, PROMPT)
    for name in chosen:
        if ALL[name].event is not None and not IDLE.get(name, set()) & set(chosen):
            assert ALL[name].acted(counts.events), f"{name} did nothing: {dict(counts.events)}"
    if all(ALL[name].exact for name in chosen):
        assert text == greedy(lm, PROMPT)
    if decides(found.model) == "token":
        close(run(found, IDS, (7, 20, 13)), found.logits(IDS), 1e-10, "in chunks")
    assert batch == [alone, alone, short]


RANDOM_SETS = [draw_case(0, number, models=MODELS) for number in range(48)]


@pytest.mark.parametrize("case", RANDOM_SETS, ids=str)
def test_random_set_with_random_options_keeps_the_laws(case):
    """On ten kinds of blocks, with matrices that count as large and without. random_sets.py
    searches further, on shipped models too.
    """
    wrong = try_case(case)
    if wrong.startswith("refused"):
        pytest.skip(wrong)
    assert not wrong


def test_most_techniques_act_in_a_sampled_set():
    """Most techniques act in a set that is not refused."""
    used = set()
    for family, chosen in IN_ACTION:
        if in_action(family, chosen) is not None:
            used |= set(chosen)
    assert len(used) >= 0.8 * len(ALL), f"never in action: {set(ALL) - used}"


SAME_LEVEL = [
    (a, b)
    for a, b in PAIRS
    if ALL[a].level == ALL[b].level and a not in ALL[b].after and b not in ALL[a].after
]


@pytest.mark.parametrize("a, b", SAME_LEVEL, ids=[f"{a} and {b}" for a, b in SAME_LEVEL])
def test_order_within_a_level_does_not_matter_or_is_declared(a, b):
    """Two of a level that do not declare which comes first give the same in both orders, or are
    refused in both."""

    def put(*order):
        lm = tiny_lm("gpt_neox", dtype=np.float64)
        try:
            for name in order:
                lm = ALL[name].function(lm, **ALL[name].checked(ALL[name].demo))
            _check_rows(lm, {})
            return lm
        except MinitxError:
            return None

    one, other = put(a, b), put(b, a)
    assert (one is None) == (other is None), f"works in one order only; declare after= for {a}, {b}"
    if one is not None:
        close(other.logits(IDS), one.logits(IDS), 1e-12, f"{a} before {b}, and after it")


def test_in_order_sorts_by_level_then_by_after():
    found = [t.name for t in in_order(ALL.values())]
    levels = [LEVELS.index(ALL[name].level) for name in found]
    assert levels == sorted(levels)
    assert found.index("fold_norms") < found.index("absorb_products")
    for name in found:
        assert all(found.index(other) < found.index(name) for other in ALL[name].after)


# Token loops -------------------------------------------------------------------------------------


@loops
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 2}], ids=str)
def test_decoding_loop_has_the_models_distribution_by_enumeration(name, options):
    """Three tokens of a vocabulary of three, by enumeration of all draws. Of an approximate loop,
    when its options are neutral."""
    if not options:
        options = {"temperature": 1.0}
    model = tiny_model("llama", vocab_size=3, bos=None, eos=(), dtype=np.float64)
    lm = apply(LM(model), {name: exact_options(name)})
    prompt = [1, 2, 0, 1, 1, 2, 0, 1]

    def run(sampler):
        return tuple(decode(lm.decode, lm.model, prompt, sampler, 3))

    found = exact_distribution(run, **options)
    assert total_variation(found, model_distribution(model, prompt, 3, **options)) < 1e-9


def exact_options(name: str) -> dict:
    """With these a loop yields what the plain one does."""
    return ALL[name].demo if ALL[name].exact else ALL[name].neutral


@loops
@family
def test_decoding_loop_stops_at_limit_and_end_of_context(name, family):
    setting = "demo" if ALL[name].exact else "neutral"
    dense, lm = tiny_lm(family, dtype=np.float64), changed(name, family, setting)
    expected = greedy(dense, PROMPT, 36)
    for limit in range(6):
        assert greedy(lm, PROMPT, limit) == expected[:limit], f"limit {limit}"
    assert greedy(lm, PROMPT, 36) == expected  # 12 + 36 tokens fill the context
    assert lm.generate([1] * 48) == [] and len(lm.generate([1] * 47)) <= 1


@other_loops
@family
def test_approximate_loop_yields_at_most_limit_tokens_and_stops_at_end_of_context(name, family):
    lm = changed(name, family)
    for limit in (*range(6), 36):  # 12 + 36 tokens fill the context
        assert len(greedy(lm, PROMPT, limit)) == limit
        assert greedy(lm, PROMPT, limit) == greedy(lm, PROMPT, limit)
    assert lm.generate([1] * 48) == [] and len(lm.generate([1] * 47)) <= 1


@loops
def test_decoding_loop_stops_at_end_of_text(name):
    def ends(n):
        """The dense model, but that its n-th greedy token ends a text."""
        config = tiny_lm().model.config
        end = greedy(tiny_lm(), PROMPT)[n]
        return tiny_lm(model=tiny_model(eos=(END, end)) if config.eos else None)

    for n in (0, 3, 7):
        lm = ends(n)
        found = apply(lm, {name: exact_options(name)}).generate(PROMPT, NEW)
        assert found == lm.generate(PROMPT, NEW) and len(found) <= n


@loops
@family
def test_decoding_loop_continues_from_a_warm_state(name, family):
    """The state may hold the first tokens of the prompt already."""
    from minitx.decode import Sampler

    lm = changed(name, family)
    expected = greedy(lm, PROMPT)
    for held in (1, 7, 11):
        state = lm.model.new_state()
        lm.model(PROMPT[:held], state)
        found = list(lm.decode(lm.model, state, PROMPT, Sampler(), NEW))
        assert found == expected, f"{held} tokens of the prompt were there"
