"""Tutorial 17: answer once. Somebody asked this before: why compute it again? And does an easy
question need the big model?

All tutorials so far skip a part of a pass. Here whole passes are skipped: the answer is known, or
half of the work is, or a small model's answer is good enough. Five ways, and for each the same
three questions: what is skipped, what must match, and what goes wrong if it does not?

Letters: D width, c cost of the small model's answer, with the big one's as 1, a the share of
answers that are kept.
"""

# %% The models and the questions
import json
from fractions import Fraction
from hashlib import sha256
from itertools import product

import numpy as np
from helpers import (
    QUESTION,
    STORY,
    bar,
    bar_chart,
    calibration_stories,
    held_out_stories,
    load_stories,
    print_table,
    save_lines,
    title,
)

import minitx
from minitx.ledger import counting
from minitx.lab.answers import counting_calls, questions_of
from minitx.lab.semantic_hits import requests, upper_bound
from minitx.shared.small_answers import Example
from minitx.skip.majority_vote import majority_accuracy
from minitx.skip.router import PromptTokens, learned
from minitx.skip.semantic_cache import embedding
from minitx.training.stories.grammar import NAMES

big = load_stories()
small = minitx.load("stories-draft")
stories = held_out_stories(60)
prompt = big.encode(STORY + QUESTION)

# %% 1. The same question twice
# A dictionary remembers answers; its key is the prompt. Then six requests with
# the same prompt, of which the last four want something else. Which of them get a wrong answer?
title("1. A dictionary as a cache")
answers = {}


def ask(lm, ids, limit, **settings):
    key = tuple(ids)
    if key not in answers:
        answers[key] = lm.generate(ids, limit, **settings)
    return answers[key]


low_rank = minitx.load("stories", low_rank={"rank": 8, "weighted": False})
wanted = [
    ("4 tokens", big, 4, {}),
    ("the same again", big, 4, {}),
    ("6 tokens", big, 6, {}),
    ("temperature 2, seed 1", big, 4, {"temperature": 2, "seed": 1}),
    ("temperature 2, seed 2", big, 4, {"temperature": 2, "seed": 2}),
    ("other weights", low_rank, 4, {}),
]
wrong = 0
for name, lm, limit, settings in wanted:
    served, right = ask(lm, prompt, limit, **settings), lm.generate(prompt, limit, **settings)
    wrong += served != right
    texts = [big.tokenizer.decode(ids).strip() for ids in (served, right)]
    mark = "" if served == right else "  <- wrong"
    print(f"  {name:21}  served: {texts[0]:16} right: {texts[1]:32}{mark}")
assert wrong == 4
# Everything that can change the answer belongs to the key: the limit, temperature and seed, the
# weights, every technique. Nothing fails when something is missing. The answer looks fine; it is
# the answer to another request.

# %% ... writing the key down
# A key is a text, or a hash of one. Two ways to write it badly: which of these are equal?
first, second = [1, 23], [12, 3]
glued = ["".join(map(str, ids)) for ids in (first, second)]
print(f"ids {first} and {second}, glued together: {glued[0]!r} and {glued[1]!r}")
print(f"as lists: {json.dumps(first)!r} and {json.dumps(second)!r}")
print(f"1 == 1.0 == True: {1 == 1.0 == True}; as JSON: {json.dumps([1, 1.0, True])}")
assert glued[0] == glued[1] and {1: "one"}[True] == "one"
# Glued ids are a false hit. Numbers of different types are one key in a dictionary and three in a
# text, where the same temperature, 1 or 1.0, would be a needless miss. So: convert each setting to
# one type, write lists as lists with their names in a fixed order, and hash that text.

# %% ... with the flag
# `answer_cache` has such a key. We count passes of the model. The first request runs it 4 times, a
# pass for each token. And the others?
title("... load('stories', answer_cache=...): passes of the model")
caching = minitx.load("stories", answer_cache={"file": "memory"})
wanted[-1] = "no seed", caching, 4, {"temperature": 2}
table = []
for name, _, limit, settings in wanted + wanted[-1:]:
    with counting_calls(caching) as passes, counting(caching) as counts:
        found = caching.generate(prompt, limit, **settings)
    table.append([name, passes["model"], counts.total().multiply_adds, ", ".join(counts.events)])
    if "seed" in settings or settings == {}:
        assert found == big.generate(prompt, limit, **settings)
print_table(["request", "passes", "multiply-adds", "event"], table)
assert [row[1] > 0 for row in table] == [True, False, True, True, True, True, True]
# The same request takes no pass at all. Without a seed, each answer is a fresh draw, by intention,
# so nothing is stored and nothing is served: whoever caches it freezes one throw of the dice.
#
# By default the answers are in a file. If a process is killed while it generates, nothing of that
# answer is in the file, since only complete answers are stored, each in one transaction of SQLite:
# all of it or nothing. And what is read back is checked before it is served.

# %% 2. The same beginning
# Two prompts seldom are equal, but many begin alike: the same instructions, the same document. In a
# causal model, the keys and values of a token depend on it and on earlier tokens alone. So they can
# be reused up to the first token that differs. They are stored in blocks, by a hash of the block
# and of the hash before it. Here are blocks of 4 tokens; the hash stands behind each.
title("2. Blocks of 4 tokens and their hashes")


def chained_hashes(ids, block=4):
    """A hash for each full block, which covers all tokens up to its end."""
    hashes, before = [], b""
    for start in range(0, len(ids) - block + 1, block):
        tokens = np.array(ids[start : start + block], "<i8").tobytes()  # 8 bytes for each id
        before = sha256(before + tokens).digest()
        hashes.append(before.hex()[:4])
    return hashes


sequences = {
    "first": [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22],
    "same beginning": [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 99, 98, 97],
    "another first token": [77, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22],
}
for name, ids in sequences.items():
    blocks = ""
    for i, block_hash in enumerate(chained_hashes(ids)):
        blocks += " ".join(map(str, ids[4 * i : 4 * i + 4])) + f" [{block_hash}]  "
    print(f"  {name:20} {blocks}{ids[12]}")
one, other, moved = map(chained_hashes, sequences.values())
assert one[:2] == other[:2] and one[2] != other[2] and not set(one) & set(moved)
# The second prompt has 10 tokens in common with the first and reuses 8, two blocks. The third one
# has the same second block, 14 15 16 17, but another hash: its keys and values are different, since
# those tokens have seen 77. Only full blocks are stored: 22 waits for three more.

# %% ... on the model
# A story, and a question about each person in it. Up to the question all prompts are equal. How
# much work is it until the first token of an answer? The last prompt is the first one with another
# first word.
title("... load('stories', prefix_cache=...): work until the first token")
reusing = minitx.load("stories", prefix_cache={"block": 16})
text = stories[3].text
people = [name for name in NAMES if f" {name} " in text]
prompts = [f"{text} Where is {name}? {name} is in the" for name in people]
first_word = text.split()[0]
prompts.append("Then" + prompts[0].removeprefix(first_word))
table = []
for name, question in zip([*people, "other first word"], prompts):
    ids = big.encode(question)
    with counting(big) as alone:
        expected = big.generate(ids, 1)
    with counting(reusing) as counts:
        assert reusing.generate(ids, 1) == expected
    work, work_alone = counts.total().multiply_adds, alone.total().multiply_adds
    reused = counts.events["prompt tokens reused"]
    table.append([name, len(ids), reused, work_alone, work, f"{work / work_alone:.2f}"])
print_table(["question", "tokens", "reused", "multiply-adds", "with the cache", "share"], table)
assert reused == 0 and table[1][4] < 0.3 * table[1][3]
# All but the last block of the story is there from the second question on: a tenth of the work is
# left. And one other word at the front makes everything new. So what is the same goes first in a
# prompt, and what differs (a date, a name) last. It is exact: the keys and values are the same. The
# price is memory: here 4,096 bytes for each stored token.

# %% 3. Nearly the same question
# Most people ask in their own words. A semantic cache serves the answer of a stored prompt that is
# similar enough. Similar how? Count words: each prompt is a vector with a number for each word, and
# the similarity is the cosine of the angle between two of them. "add 2 and 3" and "add 2 and 8"
# have 3 words of 4 in common: 3 / (sqrt(4) sqrt(4)) = 0.75. Which of these pairs may share an
# answer, and which of them are most similar?
title("3. Cosines of word counts, by hand")


def cosine(a, b):
    words = sorted({*a.split(), *b.split()})
    x, y = (np.array([text.split().count(word) for word in words]) for text in (a, b))
    return x @ y / np.sqrt((x @ x) * (y @ y))


pairs = [
    ("add 2 and 3", "add 2 and 8", "no"),
    ("is 7 prime", "is 7 not prime", "no"),
    ("please help me cancel my order", "please help me cancel my subscription", "no"),
    ("please help me cancel my order", "what is the way to stop an order", "yes"),
]
for a, b, same in pairs:
    print(f"  {cosine(a, b):.3f}  same answer: {same:3}  {a} / {b}")
assert max(pairs, key=lambda pair: cosine(*pair[:2]))[2] == "no" and cosine(*pairs[3][:2]) < 0.15
# The wrong way round: the paraphrase has the lowest similarity. A threshold that lets it pass lets
# the others pass, too. Trained embeddings know that "stop" is like "cancel"; but 3 is like 8, too.

# %% ... on the model
# `semantic_cache` takes the mean of the embeddings of a prompt's tokens, which costs no pass. One
# story and five prompts that differ a little. The answer stored is "park". Where would it be wrong?
title("... similarity to the prompt whose answer is park")
variants = [
    ("another mother", STORY.replace("Anna", "Rosa") + QUESTION),
    ("she is elsewhere", STORY.replace("kitchen", "cellar") + QUESTION),
    ("he goes elsewhere", STORY.replace("park", "cellar") + QUESTION),
    ("names exchanged", STORY.replace("Tom went", "Anna went") + QUESTION),
    ("about Anna", STORY + QUESTION.replace("Tom", "Anna")),
    ("other words", STORY.replace("Tom went", "After lunch Tom ran") + QUESTION),
]
stored = embedding(big.model, prompt)
for name, question in variants:
    ids = big.encode(question)
    similarity = embedding(big.model, ids) @ stored
    answer = big.tokenizer.decode(big.generate(ids, 1)).strip()
    print(f"  {similarity:.4f}  {name:18} answer: {answer}")
