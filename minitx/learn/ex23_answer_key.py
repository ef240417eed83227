"""Exercise 23: The key of an answer (25 minutes)

The cheapest token is the one that is not computed. A model with the same weights, the same prompt
and the same settings writes the same answer again, so a server may keep answers and look them up:

    key = request_key(request)
    answer = kept.get(key)            # None: generate it, then keep it under this key

Everything depends on the key. If it leaves out something that changes the answer, somebody gets the
answer to another question, and no error is raised. If it contains something that changes nothing,
answers are computed again for no reason: a needless miss. Write request_key. A request is a dict:

    request["id"]              the number of the request, another one each time
    request["stream"]          True: show the answer word by word; False: at the end
    request["model"]           hash of the weights, such as "9f2c"
    request["dtype"]           "float32", "float16": what the model computes in
    request["techniques"]      what is switched on: {name: {setting: value}}
    request["prompt"]          list of token ids
    request["max_new_tokens"]  an integer
    request["temperature"]     a number >= 0; 0 is greedy decoding, which draws nothing
    request["top_k"]           an integer, or None
    request["top_p"]           a number, or None
    request["seed"]            of the random numbers; an integer, 0 or more, or None

The rules:

1. id and stream do not change the answer. Everything else may, also a field that is not listed here
   because a later version has added it ("stop", say): two requests with another value have two
   keys, unless rule 2 or 3 says otherwise.
2. At temperature 0, top_k, top_p and seed do not matter: no technique here draws anything then.
3. The order of the fields does not matter, nor that of the techniques, nor that of their settings.
   temperature and top_p are integers in some programs and floats in others: 1 and 1.0 are the same.
4. Above temperature 0 without a seed, every answer is another draw. It must not be kept: return
   None.
5. Otherwise return a str or bytes that is the same in every process, since answers are kept in a
   file. Python's hash() is not: for texts it changes from one process to the next. The text itself
   will do; sha256 of it is shorter.
6. The request stays as it is.

    >>> request = {
    ...     "id": 1, "stream": True, "model": "9f2c", "dtype": "float32", "techniques": {},
    ...     "prompt": [5, 8], "max_new_tokens": 20, "temperature": 0, "top_k": None, "top_p": None,
    ...     "seed": 3,
    ... }
    >>> request_key(request) == request_key(request | {"id": 2, "seed": 4})
    True
    >>> request_key(request) == request_key(request | {"dtype": "float16"})
    False
    >>> print(request_key(request | {"temperature": 0.8, "seed": None}))
    None

Nobody sees your key: the checker compares which requests share one. json.dumps(value,
sort_keys=True) turns dicts, lists, numbers and None into a text.

Source: none. Compare GPTCache (github.com/zilliztech/GPTCache), whose key is the last message,
without model and temperature, unless one says otherwise. Tutorial 17 shows what that leads to.
"""

# isort: off
# given
import json

# end of given
# isort: on

import copy

import minitx
from minitx.lab.layout import table
from minitx.learn.exercise import Exercise, Mistake
from minitx.technique import apply


# solution
def request_key(request):
    """A request (dict) -> its key (str or bytes), or None if its answer must not be kept."""
    fields = {name: value for name, value in request.items() if name not in ("id", "stream")}
    if request["temperature"] == 0:
        fields |= {"temperature": 0.0, "top_k": None, "top_p": None, "seed": None}
    elif request["seed"] is None:
        return None
    for name in ("temperature", "top_p"):
        if fields[name] is not None:
            fields[name] = float(fields[name])
    return json.dumps(fields, sort_keys=True)


# end of solution


def in_loops(request):
    """The rules, one after another, without JSON."""
    if request["temperature"] > 0 and request["seed"] is None:
        return None
    parts = []
    for name in sorted(request):
        value = request[name]
        if name in ("id", "stream"):
            continue
        if request["temperature"] == 0 and name in ("top_k", "top_p", "seed"):
            continue
        if name in ("temperature", "top_p") and value is not None:
            value = float(value)
        parts.append(f"{name}: {written(value)}")
    return "\n".join(parts)


def written(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r}: {written(value[name])}" for name in sorted(value)) + "}"
    return repr(value)


def flawed(
    request,
    *,
    irrelevant=("id", "stream"),
    known_only=False,
    missing=None,
    greedy=True,
    greedy_needs_seed=False,
    order="none",
    numbers=True,
    ids="list",
    unseeded="None",
    seed_0="a seed",
    kind=str,
    changes=False,
):
    fields = request if changes else dict(request)
    for name in irrelevant:
        del fields[name]
    if known_only:
        for name in fields.keys() - KNOWN:
            del fields[name]
    no_seed = fields["seed"] is None or (seed_0 == "no seed" and fields["seed"] == 0)
    drawn = fields["temperature"] > 0
    if no_seed and (drawn and unseeded == "None" or not drawn and greedy_needs_seed):
        return None
    if not drawn and greedy:
        fields |= dict.fromkeys(("top_k", "top_p", "seed"))
    if drawn and unseeded == "always None":
        return None
    for name in ("temperature", "top_p") if numbers else ():
        fields[name] = None if fields[name] is None else float(fields[name])
    if ids == "joined":
        fields["prompt"] = "".join(map(str, fields["prompt"]))
    if missing is not None:
        del fields[missing]
    if order == "settings":
        fields = {name: str(value) for name, value in fields.items()}
    key = json.dumps(fields, sort_keys=order != "fields")
    return hash(key) if kind is int else key


KNOWN = {"model", "dtype", "techniques", "prompt", "max_new_tokens"}
KNOWN |= {"temperature", "top_k", "top_p", "seed"}

MISTAKES = (
    Mistake(
        "Every request has another id, so with id in the key no answer is ever found again.",
        irrelevant=("stream",),
    ),
    Mistake(
        "stream is in the key: the same answer is generated again only because it is shown in "
        "another way.",
        irrelevant=("id",),
    ),
    Mistake(
        "id and stream are in the key, although the answer does not depend on them: no answer is "
        "ever found again.",
        irrelevant=(),
    ),
    Mistake(
        "Fields that you do not know are left out of the key. They may change the answer, so leave "
        "out id and stream, and keep everything else.",
        known_only=True,
    ),
    Mistake("model is not in the key: a request gets another model's answer.", missing="model"),
    Mistake(
        "dtype is not in the key. float16 rounds more, and where two logits nearly tie, another "
        "token may come first.",
        missing="dtype",
    ),
    Mistake(
        "techniques are not in the key: a request gets the answer of a model that skips work.",
        missing="techniques",
    ),
    Mistake(
        "max_new_tokens is not in the key: a request gets an answer that is cut off, or too long.",
        missing="max_new_tokens",
    ),
    Mistake(
        "temperature is not in the key: a request gets an answer that was drawn at another one.",
        missing="temperature",
    ),
    Mistake("top_k is not in the key, although it changes what is drawn.", missing="top_k"),
    Mistake("top_p is not in the key, although it changes what is drawn.", missing="top_p"),
    Mistake(
        "seed is not in the key: above temperature 0, another seed draws other tokens.",
        missing="seed",
    ),
    Mistake(
        "A needless miss: at temperature 0 nothing is drawn, so top_k, top_p and seed do not "
        "matter.",
        greedy=False,
    ),
    Mistake(
        "At temperature 0 you return None without a seed, but a greedy answer is always the same: "
        "return a key.",
        greedy_needs_seed=True,
    ),
    Mistake(
        "The key depends on the order of the fields. Sort them by name, those inside techniques "
        "too: json.dumps(..., sort_keys=True).",
        order="fields",
    ),
    Mistake(
        "The key depends on the order of the techniques or of their settings: sort inside, too.",
        order="settings",
    ),
    Mistake(
        "1 and 1.0 are the same temperature, but different texts: convert temperature and top_p to "
        "float.",
        numbers=False,
    ),
    Mistake(
        "You join the ids of the prompt without anything between them, so [1, 23] and [12, 3] have "
        "the same key.",
        ids="joined",
    ),
    Mistake(
        "Above temperature 0 without a seed you return a key, so the first draw would be served "
        "forever. Return None.",
        unseeded="a key",
    ),
    Mistake(
        "With a seed, a sampled answer is the same every time, so it can be kept: return a key.",
        unseeded="always None",
    ),
    Mistake(
        "Seed 0 is a seed like any other: compare with `is None`, for 0 counts as false.",
        seed_0="no seed",
    ),
    Mistake(
        "Return a str or bytes. A number from hash() changes from one process to the next, so an "
        "answer that was kept in a file is never found again.",
        kind=int,
    ),
    Mistake(
        "Your code changes the request, which still has to be answered: make a copy with "
        "dict(request) first.",
        changes=True,
    ),
)


# Pairs of requests -------------------------------------------------------------------------------


def observe(answer, kind, numbers):
    """For each pair of requests: is the second one served with the answer to the first one?"""
    pairs = (greedy_pairs if kind == "greedy requests" else sampled_pairs)(*numbers)
    return {difference: served(answer.request_key, *pair) for difference, *pair in pairs}


def served(request_key, first, second):
    requests = dict(first), dict(second)
    keys = [request_key(request) for request in requests]
    for key in keys:
        if not isinstance(key, str | bytes | None):
            return f"a key of type {type(key).__name__}"
    if keys == [None, None]:
        return "not kept"
    if requests != (first, second):
        return "the request is changed"
    if None in keys:
        return "only one of them is kept"
    return "the same key" if keys[0] == keys[1] else "two keys"


def cases(rng):
    """Pairs of requests with one difference each: greedy ones, then sampled ones."""
    for kind in ("greedy requests", "sampled requests"):
        yield kind, rng.permutation(900)[:4].tolist()


TECHNIQUES = {"early_exit": {"threshold": 0.9, "first": 2}, "quantize": {"bits": 8}}


def greedy_request(number, model, token, limit):
    return {
        "id": number,
        "stream": True,
        "model": f"{model:x}",
        "dtype": "float32",
        "techniques": copy.deepcopy(TECHNIQUES),
        "prompt": [1, 23, token],
        "max_new_tokens": limit,
        "temperature": 0.0,
        "top_k": None,
        "top_p": None,
        "seed": None,
    }


def greedy_pairs(*numbers):
    """(the difference in words, a request, another one)"""
    one = greedy_request(*numbers)
    turned = dict(reversed(TECHNIQUES.items()))
    settings_turned = TECHNIQUES | {"early_exit": {"first": 2, "threshold": 0.9}}
    return [
        ("another id", one, one | {"id": 1001}),
        ("another stream", one, one | {"stream": False}),
        ("another order of fields", one, dict(reversed(one.items()))),
        ("another order of techniques", one, one | {"techniques": turned}),
        ("another order of settings", one, one | {"techniques": settings_turned}),
        ("another seed at temperature 0", one | {"seed": 0}, one | {"seed": 3}),
        ("another top_k at temperature 0", one, one | {"top_k": 5}),
        ("another top_p at temperature 0", one, one | {"top_p": 0.5}),
        ("temperature 0.0 and 0", one, one | {"temperature": 0}),
        ("another model", one, one | {"model": "another"}),
        ("another dtype", one, one | {"dtype": "float16"}),
        ("no techniques", one, one | {"techniques": {}}),
        ("other bits", one, one | {"techniques": TECHNIQUES | {"quantize": {"bits": 4}}}),
        ("another max_new_tokens", one, one | {"max_new_tokens": 1000}),
        ("a shorter prompt", one, one | {"prompt": [1, 23]}),
        ("a prompt in another order", one, one | {"prompt": one["prompt"][::-1]}),
        ("prompts 1 23 and 12 3", one | {"prompt": [1, 23]}, one | {"prompt": [12, 3]}),
        ("a field that is new", one, one | {"stop": [13]}),
        ("another value of the new field", one | {"stop": [13]}, one | {"stop": [14]}),
    ]


def sampled_pairs(*numbers):
    one = greedy_request(*numbers)
    drawn = one | {"temperature": 0.7, "seed": numbers[0]}
    no_seed, zero = drawn | {"seed": None}, drawn | {"seed": 0}
    return [
        ("another id, with a seed", drawn, drawn | {"id": 1001}),
        ("another id, with seed 0", zero, zero | {"id": 1001}),
        ("another id, without a seed", no_seed, no_seed | {"id": 1001}),
        ("temperature 1 and 1.0", drawn | {"temperature": 1}, drawn | {"temperature": 1.0}),
        ("top_p 1 and 1.0", drawn | {"top_p": 1}, drawn | {"top_p": 1.0}),
        ("another temperature", drawn, drawn | {"temperature": 1.5}),
        ("another top_k", drawn | {"top_k": 5}, drawn | {"top_k": 6}),
        ("a top_k where there was none", drawn, drawn | {"top_k": 5}),
        ("another top_p", drawn, drawn | {"top_p": 0.5}),
        ("another seed", drawn, drawn | {"seed": 1000}),
        ("greedy, then sampled", one, drawn),
    ]


# What it shows -----------------------------------------------------------------------------------

DAY = (  # what is asked of ``stories``, one after another
    ("greedy, 12 tokens", {}),
    ("the same again", {}),
    ("the same, with a seed", {"seed": 7}),
    ("8 tokens", {"max_new_tokens": 8}),
    ("temperature 0.8, seed 1", {"temperature": 0.8, "seed": 1}),
    ("the same again", {"temperature": 0.8, "seed": 1}),
    ("temperature 0.8, no seed", {"temperature": 0.8}),
    ("the same again", {"temperature": 0.8}),
    ("without layers 1 and 2", {"techniques": {"layer_skip": {"drop": "1,2"}}}),
)


def show(answer):
    """A few requests to ``stories``, with the answer's keys in a cache."""
    lm, kept, rows = minitx.load("stories"), {}, [["request", "comes from", "answer"]]
    for number, (name, wanted) in enumerate(DAY):
        request = dict(id=number, stream=False, model="stories", dtype="float32", techniques={})
        request |= dict(prompt=lm.encode("Once upon a time"), max_new_tokens=12, temperature=0.0)
        request |= dict(top_k=None, top_p=None, seed=None) | wanted
        key = answer.request_key(request)
        found = kept.get(key)
        if found is None:
            found = generated(lm, request)
        source = "the cache" if key in kept else "the model"
        if key is not None:
            kept[key] = found
        rows.append([name, source, lm.tokenizer.decode(found).strip()])
    return table(rows)


def generated(lm, request):
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    settings = {name: request[name] for name in names}
    return apply(lm, request["techniques"]).generate(request["prompt"], **settings)


EXERCISE = Exercise(
    title="The key of an answer",
    minutes=25,
    difficulty="medium",
    names=("request_key",),
    cases=lambda rng: list(cases(rng)),
    observe=observe,
    flawed=flawed,
    mistakes=MISTAKES,
    hints=(
        "Begin with a copy of the request, take out what changes nothing, and turn the rest into a "
        "text. To take out two fields is safer than to list all that matter: what you forget then "
        "costs a miss, not a wrong answer.",
        "fields = dict(request) is a copy; del fields['id'] and fields['stream']. At temperature 0 "
        "set top_k, top_p and seed to None; otherwise return None if there is no seed. Convert "
        "temperature and top_p to float if they are not None, and return json.dumps(fields, "
        "sort_keys=True).",
    ),
    library="minitx/shared/answer_key.py: request and key_of",
    show=show,
    saves=(
        "An answer that is found under its key costs no multiply-adds at all. minitx's own key "
        "keeps top_k and top_p at temperature 0: one of its techniques, majority vote, samples "
        "even then."
    ),
)
