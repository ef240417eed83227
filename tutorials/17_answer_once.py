# %% [markdown]
"""Tutorial 17: answer once. Somebody asked this before, so why compute it again? And does an easy
question need the big model?

The other tutorials skip parts of a pass. Here whole passes are skipped. Somebody got the same
answer before (section 1), or asked something that begins alike (2), or something similar (3). Or a
small model's answer is good enough (4). Section 5 turns it around and asks several times. For each
way: what is skipped, what must match, and what goes wrong if it does not?
"""

# %% [markdown]
# ## The models

# %%
from collections import Counter
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
from minitx.lab.answers import counting_calls, questions_of
from minitx.lab.semantic_hits import requests, upper_bound
from minitx.ledger import counting
from minitx.shared.small_answers import Example
from minitx.skip.router import PromptTokens, learned
from minitx.skip.semantic_cache import embedding
from minitx.training.stories.grammar import NAMES

big, small = load_stories(), minitx.load("stories-draft")
prompt = big.encode(STORY + QUESTION)

# %% [markdown]
# ## 1. The same question twice
#
# A dictionary remembers answers. Its key is the prompt.

# %%
answers = {}


def ask(lm, ids, limit, **settings):
    key = tuple(ids)
    if key not in answers:
        answers[key] = lm.generate(ids, limit, **settings)
    return answers[key]


# %% [markdown]
# ## ... and six requests
#
# All have the same prompt, but only the first two ask for the same. The last four want more tokens,
# or another temperature or seed, or ask a model whose weights have been changed (tutorial 9). What
# do they get?

# %%
title("1. A dictionary as a cache")
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
    mark = "" if served == right else "<- wrong"
    print(f"  {name:21}  served: {texts[0]:16}  right: {texts[1]:24} {mark}".rstrip())
assert wrong == 4

# %% [markdown]
# All four get the first answer. Whatever can change the answer belongs to the key: the limit,
# temperature and seed, the weights, every technique. If something is missing, there is no error.
# The answer looks fine, but it is the answer to another request.

# %% [markdown]
# ## ... writing the key down
#
# To store answers in a file, we write the key as a text, or take the hash of that. Here is a way to
# get it wrong.

# %%
first, second = [1, 23], [12, 3]
glued = ["".join(map(str, ids)) for ids in (first, second)]
print(f"ids {first} and {second}, glued together: {glued[0]} and {glued[1]}")
assert glued[0] == glued[1] and str(1) != str(1.0)

# %% [markdown]
# These two prompts would get the same answer: a false hit. And 1 and 1.0, which are the same
# temperature, are different texts: a needless miss. So write lists as lists, convert each setting
# to its type, put the settings in a fixed order, and hash that text.

# %% [markdown]
# ## ... with the flag
#
# `answer_cache` has such a key. We count passes of the model: the first request takes 4, one for
# each token. (Nearly all its multiply-adds are in the first pass, which reads the prompt.) And the
# others? The last two are the same request, at a temperature without a seed.

# %%
title("... load('stories', answer_cache=...): passes of the model")
caching = minitx.load("stories", answer_cache={"file": "memory"})
no_seed = ("temperature 2, no seed", caching, 4, {"temperature": 2})
table = []
for name, _, limit, settings in [*wanted[:5], no_seed, no_seed]:
    with counting_calls(caching) as passes, counting(caching) as counts:
        found = caching.generate(prompt, limit, **settings)
    table.append([name, passes["model"], counts.total().multiply_adds, *counts.events])
    if name != no_seed[0]:
        assert found == big.generate(prompt, limit, **settings)
print_table(["request", "passes", "multiply-adds", "event"], table)
assert [passes for _, passes, *_ in table] == [4, 0, 6, 4, 4, 4, 4]

# %% [markdown]
# The same request takes no pass at all. Without a seed, each answer is meant to be another draw, so
# the cache is bypassed, and nothing is stored.
#
# By default the answers are in a file, for the next process. Only complete answers are stored, each
# in one transaction of SQLite, which is all or nothing: if a process is killed while it generates,
# nothing of that answer is in the file.

# %% [markdown]
# ## 2. The same beginning
#
# Few prompts are equal, but many begin alike: with the same instructions, the same document. In a
# causal model, keys and values of a token depend on it and on earlier tokens only. So they can be
# reused up to the first token that differs.
#
# How are they found again? The tokens are cut into blocks. A block's hash is computed from its
# tokens and the hash of the block before it, and so it stands for all tokens from the beginning.
# Keys and values of the block are stored under this hash.


# %%
def chained_hashes(ids, block=4):
    """A hash for each full block, which covers all tokens up to its end."""
    hashes, before = [], b""
    for start in range(0, len(ids) - block + 1, block):
        tokens = np.array(ids[start : start + block], "<i8").tobytes()  # 8 bytes for each id
        before = sha256(before + tokens).digest()
        hashes.append(before.hex()[:4])
    return hashes


# %% [markdown]
# ## ... three sequences
#
# The second sequence ends otherwise than the first; the third begins otherwise. Each block of 4
# tokens is followed by its hash (the first four digits of it). Which hashes are equal?

# %%
title("2. Blocks of 4 tokens and their hashes")
sequences = {
    "first": [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22],
    "same beginning": [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 99, 98, 97],
    "another first token": [77, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22],
}
for name, ids in sequences.items():
    text = ""
    for i, block_hash in enumerate(chained_hashes(ids)):
        text += " ".join(map(str, ids[4 * i : 4 * i + 4])) + f" [{block_hash}]  "
    print(f"  {name:20} {text}{ids[12]}")
one, other, moved = map(chained_hashes, sequences.values())
assert one[:2] == other[:2] and one[2] != other[2] and not set(one) & set(moved)

# %% [markdown]
# The second one has 10 tokens in common with the first and reuses 8 of them, two blocks. The third
# one also has the block 14 15 16 17, but with another hash. It must not be reused: its keys and
# values are others, because these tokens have seen 77.

# %% [markdown]
# ## ... on the model
#
# A story, and a question about each person in it: the prompts differ only in the last few tokens.
# How much work is it until the first token of the answer? The last prompt is the first one again,
# with another first word.

# %%
title("... load('stories', prefix_cache=...): work until the first token")
reusing = minitx.load("stories", prefix_cache={"block": 16})
stories = held_out_stories(60)
text = stories[3].text
people = [name for name in NAMES if f" {name} " in text]
prompts = [f"{text} Where is {name}? {name} is in the" for name in people]
prompts.append("Then" + prompts[0].removeprefix(text.split()[0]))
table = []
for name, question in zip([*people, "first word"], prompts):
    ids = big.encode(question)
    with counting(big) as alone:
        expected = big.generate(ids, 1)
    with counting(reusing) as counts:
        assert reusing.generate(ids, 1) == expected
    work, dense = counts.total().multiply_adds, alone.total().multiply_adds
    reused = counts.events["prompt tokens reused"]
    table.append([name, len(ids), reused, dense, work, f"{work / dense:.2f}"])
print_table(["question", "tokens", "reused", "multiply-adds", "with the cache", "share"], table)
assert reused == 0 and table[1][4] < 0.3 * table[1][3]

# %% [markdown]
# From the second question on, the full blocks of the story are there, and only the last tokens are
# work. But with another word in front, everything is new. So put what is always the same first in a
# prompt, and what differs (a date, a name) last. The answers are the model's own, up to rounding.
# The price is memory: keys and values of each stored token.

# %% [markdown]
# ## 3. Nearly the same question, by hand
#
# People ask the same in other words. A semantic cache serves the answer of a stored prompt that is
# similar enough. To measure that, let each prompt be a vector that counts its words, and take the
# cosine of the angle between two of them. "add 2 and 3" and "add 2 and 8" have 4 words each and 3
# in common: 3 / (sqrt(4) sqrt(4)) = 0.75. Which pairs have the same answer? Which are most similar?

# %%
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
cosines = [cosine(a, b) for a, b, _ in pairs]
for similarity, (a, b, same) in zip(cosines, pairs):
    print(f"  {similarity:.3f}  same answer: {same:3}  {a} / {b}")
assert np.allclose(cosines, [0.75, 0.866, 0.833, 0.144], atol=0.001)

# %% [markdown]
# The only pair with the same answer has the lowest similarity. A threshold that accepts it accepts
# the other three, too. (A trained embedding knows that to stop is like to cancel. But to it, 3 is
# like 8, too.)

# %% [markdown]
# ## ... one story
#
# `semantic_cache` takes the mean of the embeddings of a prompt's tokens, for which no layer has to
# run. The stored answer is "park". Where would it be wrong?

# %%
title("... similarity to a prompt whose answer is park")
other_way = STORY.replace("park", "?").replace("garden", "park").replace("?", "garden")
variants = {
    "Tom the other way": other_way + QUESTION,
    "a kind boy": STORY.replace("a boy", "a kind boy") + QUESTION,
    "Rosa, not Anna": STORY.replace("Anna", "Rosa") + QUESTION,
    "Anna elsewhere": STORY.replace("kitchen", "cellar") + QUESTION,
    "Tom elsewhere": STORY.replace("park", "cellar") + QUESTION,
    "in other words": STORY.replace("Tom went", "After lunch Tom ran") + QUESTION,
    "where is Anna?": STORY + QUESTION.replace("Tom", "Anna"),
}
stored, similar = embedding(big.model, prompt), {}
for name, question in variants.items():
    ids = big.encode(question)
    similar[name] = embedding(big.model, ids) @ stored
    answer = big.tokenizer.decode(big.generate(ids, 1))
    print(f"  {similar[name]:.4f}  {name:18} answer:{answer}")
assert similar["Tom the other way"] > 0.99999
assert similar["Tom elsewhere"] > similar["in other words"]

# %% [markdown]
# It is wrong where the model's answer is not park. "From the garden to the park" and "from the park
# to the garden" have the same words, so to the cache they are the same prompt. It makes no
# difference either who is elsewhere: Tom, about whom we ask, or Anna. And other words for the same
# are less similar than another fact.

# %% [markdown]
# ## ... hits and false hits
#
# Now the questions in 30 stories. Each is stored, and then come similar prompts: two with another
# word somewhere in the story, and one about another person or thing, if there is one. A hit is a
# similarity that reaches the threshold; a false hit is one where the model itself would answer
# something else. To know that, we let it answer all of them (with the prefix cache, since they
# begin alike).

# %%
similar, same = [], []
for question, *others in requests(big, 30, changes=2):
    stored, answer = embedding(big.model, question), reusing.generate(question, 1)
    for ids in others:
        similar.append(embedding(big.model, ids) @ stored)
        same.append(reusing.generate(ids, 1) == answer)
similar, same = np.array(similar), np.array(same)

# %% [markdown]
# ## ... by threshold
#
# Is there a threshold with many hits and no false ones? The column "at most" says how large
# P(wrong | hit) may be, given that we have seen only so many hits (at 95% confidence).

# %%
title("... by threshold")
table = []
for threshold in (0.99, 0.999, 0.9995, 0.9999):
    hits, false = np.sum(similar >= threshold), np.sum(~same[similar >= threshold])
    rate, wrong_if_hit = hits / len(same), false / max(hits, 1)
    shares = [f"{x:.1%}" for x in (wrong_if_hit, upper_bound(false, hits), rate * wrong_if_hit)]
    table.append([threshold, f"{rate:.0%}", f"{false} of {hits}", *shares])
print_table(["threshold", "hits", "false", "P(wrong | hit)", "at most", "wrong answers"], table)
below = np.mean(similar[same] < similar[~same].max())
print(
    f"A threshold above all prompts with another answer loses {below:.0%} of those with the same."
)
assert below > 0.5

# %% [markdown]
# So there is none: to be rid of all false hits, we lose most of the right ones. What a user notices
# is a product:
#
#     wrong answers = hit rate * P(wrong | hit)
#
# so a hit rate alone says nothing.

# %% [markdown]
# ## ... none was wrong, of how many?
#
# "No false hit" says nothing either, unless we know of how many. Say that a hit is wrong with
# probability P. Then none of n is wrong with probability (1 - P)^n. This falls to 5% at
# P = 1 - 0.05^(1 / n): at 95% confidence, P is not larger. What is that for 30, and for 3,000?

# %%
for n in (30, 300, 3000):
    print(f"  none of {n:4} wrong: P(wrong | hit) is at most {1 - 0.05 ** (1 / n):.2%}")
    assert np.isclose(upper_bound(0, n), 1 - 0.05 ** (1 / n))

# %% [markdown]
# So the last row of the table, with few hits, promises little. (In other stories, 1 of 48 was
# wrong.)

# %% [markdown]
# ## 4. Ask the small model first, by hand
#
# If nobody asked before, does the question need the big model? Let the small one answer. If it is
# sure, keep that; if not, ask the big one. Say that the small model costs 1 and the big one 20.
# Every request pays 1, and those that are not kept pay 20 as well. How many have to be kept?

# %%
title("4. The cost of a cascade, by hand (the big model alone: 20)")
SHARES = (0, 0.05, 0.3, 0.6, 0.9)
costs = [1 + (1 - kept) * 20 for kept in SHARES]
bar_chart([f"{kept:.0%} kept" for kept in SHARES], costs, "{:.1f}")
assert costs[1] == 20 and costs[3] == 9

# %% [markdown]
# More than 5%, the ratio of the costs. That is easy. It is harder to keep only right answers.

# %% [markdown]
# ## ... the two models
#
# Which of the two answers the questions in stories rightly? All prompts of a story are beginnings
# of its last one, so one pass over that predicts all answers.


# %%
def answer_logits(lm, questions):
    """The logits (questions, V) after each prompt."""
    found = []
    for story in sorted({question.story for question in questions}):
        prompts = [question.prompt for question in questions if question.story == story]
        found.append(lm.logits(prompts[-1])[[len(ids) - 1 for ids in prompts]])
    return np.concatenate(found)


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


# %% [markdown]
# ## ... by hops
#
# Hops are the facts that have to be chained for an answer; "counts" are the questions how many
# there are of something. Where is the small model good enough?

# %%
title("... the two models, by hops")
questions = questions_of(big, stories)
truth = np.array([question.answer[0] for question in questions])
hops = np.array([question.hops for question in questions])
logits = answer_logits(small, questions)
small_right = logits.argmax(-1) == truth
big_right = answer_logits(big, questions).argmax(-1) == truth
table = []
for number, name in enumerate(("counts", "1 hop", "2 hops", "3 hops")):
    shares = [f"{right[hops == number].mean():.0%}" for right in (small_right, big_right)]
    table.append([name, np.sum(hops == number), *shares])
ends = small_right.mean(), big_right.mean()
table.append(["all", len(truth), *(f"{end:.0%}" for end in ends)])
print_table(["", "answers", "small right", "big right"], table)
assert ends[0] < ends[1]

# %% [markdown]
# Even with 1 hop the small model is wrong more than half of the time, so hops alone do not tell.

# %% [markdown]
# ## ... and their costs

# %%
works = []
for lm in (small, big):
    with counting(lm) as counts:
        lm.generate(prompt, 1)
    works.append(counts.total().multiply_adds)
c = works[0] / works[1]
print(f"An answer takes {works[0]:,} multiply-adds, or {works[1]:,}: c = {c:.3f} of the big one's.")

# %% [markdown]
# ## ... does the small model know what it knows?
#
# How sure is it? In each row are the answers to which it gives a probability between two tenths: of
# its right answers on the left, and of its wrong ones on the right. Each column adds up to 100%. If
# they did not overlap, a threshold between them would be perfect.

# %%
title("... how sure the small model is")
sure = softmax(logits).max(-1)
tenth = np.minimum((10 * sure).astype(int), 9)
columns = []
for rows in (small_right, ~small_right):
    columns.append(np.bincount(tenth[rows], minlength=10) / rows.sum())
print("             right                           wrong")
for i in range(10):
    bars = [f"{x[i]:4.0%} {bar(x[i], np.max(columns), 25):26}" for x in columns]
    print(f"  {i / 10:.1f}-{(i + 1) / 10:.1f}   {' '.join(bars)}".rstrip())
surer = np.mean(sure[small_right][:, None] > sure[~small_right])
print(f"A right answer is surer than a wrong one in {surer:.0%} of all pairs (by chance: 50%).")
assert surer > 0.55

# %% [markdown]
# ## ... a threshold, and a router
#
# The columns overlap, but they differ. So a threshold can help. We choose it on calibration
# stories, which are others than those that we judge by.
#
# A router is the other way to save: it decides before anybody answers. Ours is a logistic
# regression on the last words of a prompt, which has learned, on calibration stories, to predict
# whether the small model will be right.

# %%
examples = questions_of(big, calibration_stories(40))
example_logits = answer_logits(small, examples)
example_sure = softmax(example_logits).max(-1)
pairs = []
for example, row in zip(examples, example_logits):
    pairs.append(Example(example.prompt, None, row.argmax() == example.answer[0]))
features = PromptTokens()
w, b = learned(features, small.model, pairs, np.float32)
easy = [features(small.model, None, question.prompt) @ w + b for question in questions]
easiest = np.argsort(easy)[::-1]

# %% [markdown]
# ## ... at the same cost
#
# A cascade costs c + (1 - kept) for each question. Whoever decides beforehand, the router or a
# random choice, pays only one model: share * c + (1 - share), if the small one gets this share of
# the questions. So at the same cost they can ask the big model a little more often. We take
# thresholds that keep 80% to 20% of the answers in calibration stories. Who is right more often?

# %%
title("... right answers at the same cost")
lines = {name: [ends[0]] for name in ("cascade", "router", "random")}
costs, table = [c], []
for part in (0.8, 0.6, 0.4, 0.2):
    threshold = np.quantile(example_sure, 1 - part)
    kept = sure >= threshold
    costs.append(c + 1 - kept.mean())
    share = np.clip((1 - costs[-1]) / (1 - c), 0, 1)  # of questions to the small model
    routed = np.isin(np.arange(len(truth)), easiest[: round(share * len(truth))])
    lines["cascade"].append(np.where(kept, small_right, big_right).mean())
    lines["router"].append(np.where(routed, small_right, big_right).mean())
    lines["random"].append(share * ends[0] + (1 - share) * ends[1])
    accuracies = [f"{accuracy[-1]:.1%}" for accuracy in lines.values()]
    table.append([f"{threshold:.2f}", f"{kept.mean():.0%}", f"{costs[-1]:.2f}", *accuracies])
print_table(["threshold", "kept", "cost", *lines], table)
print(f"The small model alone: {ends[0]:.1%} for {c:.2f}. The big one: {ends[1]:.1%} for 1.")
for accuracy in lines.values():
    accuracy.append(ends[1])
save_lines("17_accuracy", [*costs, 1], lines, "cost (big model = 1)", "share of right answers")
assert np.mean(lines["cascade"]) > np.mean(lines["random"])

# %% [markdown]
# In the picture, random is a straight line from one model to the other, and what lies above it is
# better than chance. The cascade's line does, so the small model's probability tells something. But
# what it saves, it pays for with wrong answers that the small model was sure of.
#
# The router is within 2% or so of the random choice, above or below, depending on the stories. It
# sees the last words of the question, not the answer, and these hardly tell whether the small model
# has kept track of who went where. (Where hard questions look hard, a router is the cheaper choice,
# since no answer is computed in vain.)

# %% [markdown]
# ## ... with the flag
#
# `cascade` chooses its threshold itself, from a budget: here half of the big model's work, for
# which it has to keep a little more than half of the answers. By default it calibrates on stories
# that are cut anywhere: before a name, after an article. Or we give it questions. How many answers
# to our questions does it keep?

# %%
title("... load('stories', cascade={'budget': 0.5}), calibrated on")
cut_anywhere = minitx.load("stories", cascade={"budget": 0.5, "stories": 8})
texts = [example.prompt + example.answer for example in examples[::4]]
options = {"budget": 0.5, "stories": len(texts), "cuts": 1}  # cut before the answer
on_questions = minitx.load("stories", calibrate=texts, cascade=options)
asked = questions[::10]
table = []
for name, lm in (("stories, cut anywhere", cut_anywhere), ("questions", on_questions)):
    with counting(lm) as counts:
        right = [lm.generate(question.prompt, 1) == question.answer for question in asked]
    kept = counts.events["small answers kept"] / len(asked)
    table.append([name, f"{kept:.0%}", f"{c + 1 - kept:.2f}", f"{np.mean(right):.0%}"])
print_table(["", "kept", "cost", "right"], table)

# %% [markdown]
# In most places of a story the next word is easy to guess (tutorial 11, section 7). The threshold
# that keeps half of those is so high that no answer reaches it. All questions go to both models,
# and the cost is more than that of the big one alone. A threshold is for the kind of prompts that
# it was chosen on: calibrate on prompts like yours, and on many. (Here it was only every fourth
# one, so the second line is only roughly a half.)
#
# (A cascade decides about whole answers. `big_little` decides token by token: the small model
# writes while it is sure, then the big one reads that in one pass and corrects it, as in tutorial
# 11.)

# %% [markdown]
# ## 5. Ask several times, by hand
#
# The last way spends work to be right more often: sample several answers and take the most frequent
# one. Say that three voters are independent of each other, and each is right with probability 0.7.
# All three are right with 0.7^3 = 0.343, and exactly two with 3 * 0.7^2 * 0.3 = 0.441, together
# 0.784. We go through all eight outcomes, also for 0.4.

# %%
title("5. The majority of three, by hand")
for p in (Fraction(7, 10), Fraction(4, 10)):
    majority = Fraction(0)
    for votes in product((True, False), repeat=3):
        probability = p ** sum(votes) * (1 - p) ** (3 - sum(votes))
        if sum(votes) >= 2:
            majority += probability
    print(f"  one voter is right: {float(p)}   the majority: {float(majority)}")
    assert (majority > p) == (p > Fraction(1, 2))

# %% [markdown]
# Above one half voting helps. Below it hurts: then the majority is wrong more reliably than one.

# %% [markdown]
# ## ... on stories
#
# Here there are more than two answers. The small model's votes are draws from its distribution, at
# temperature 0.7. The first column has the questions where its most likely word is right, the
# second those where that is wrong. What do more votes change in each?

# %%
title("... right answers of the small model by voting")
vote_p = softmax(logits.astype(float) / 0.7)
rng = np.random.default_rng(0)
ballots = [rng.choice(len(row), 101, p=row).tolist() for row in vote_p]
table, rights = [], {}
for n in (1, 3, 9, 101):
    winners = [Counter(votes[:n]).most_common(1)[0][0] for votes in ballots]
    right = rights[n] = winners == truth
    shares = [f"{right[rows].mean():.0%}" for rows in (small_right, ~small_right)]
    table.append([n, *shares, f"{right.mean():.0%}"])
table.append(["greedy", "100%", "0%", f"{small_right.mean():.0%}"])
print_table(["votes", "greedy right", "greedy wrong", "all"], table)
assert rights[101][small_right].mean() > rights[1][small_right].mean()
assert rights[101][~small_right].mean() <= rights[1][~small_right].mean()

# %% [markdown]
# With more votes, the most likely word wins more often, right or wrong. For an answer of one word,
# greedy decoding has it at once. Voting can pay where many ways lead to an answer, in a long
# calculation, say: the right ways lead to the same result, and the wrong ones to different results.
# Our models write no such calculations.

# %% [markdown]
# ## ... with the flag
#
# At most 9 votes, after one pass over the prompt. Voting stops when the rest cannot change the
# result. What does it cost?

# %%
voting = minitx.load("stories-draft", majority_vote={"votes": 9})
with counting(small) as alone:
    small.generate(prompt, 1)
with counting(voting) as counts:
    voting.generate(prompt, 1)
work = counts.total().multiply_adds / alone.total().multiply_adds
print(f"{counts.events['votes cast']} votes take {work:.2f} of the work of one greedy answer")
assert 5 <= counts.events["votes cast"] <= 9 and work > 1

# %% [markdown]
# Cheap, since a vote is one token and the prompt is read once. With long answers, each vote is the
# work of a whole answer.

# %% [markdown]
# ## 6. What is skipped, what must match, what can go wrong

# %%
title("6. All of them")
rows = [
    ("", "skipped", "must match", "can go wrong"),
    ("answer cache", "all", "the whole request", "a key that leaves something out"),
    ("prefix cache", "prefill", "the first tokens", "nothing, but it takes memory"),
    ("semantic cache", "all", "the words, roughly", "another question's answer"),
    ("cascade", "the big model", "the kind of prompt", "the small model is sure, and wrong"),
    ("router", "the big model", "the kind of prompt", "a prompt that only looks easy"),
    ("majority vote", "nothing", "nothing", "most voters make the same mistake"),
]
for name, skipped, match, danger in rows:
    print(f"  {name:15} {skipped:14} {match:19} {danger}")

# %% [markdown]
# The first two are exact, so turn them on wherever requests repeat. The others trade right answers
# for work. When is the cheap answer good enough? That is for you to say, in numbers: the share of
# wrong answers and the cost, on questions like yours, beside a random choice at the same cost.

# %% [markdown]
# ## Exercises
#
# Write it yourself: this exercise continues the tutorial, and a checker names your mistakes
# (`minitx learn start exercises` writes the files).
#
# - `minitx learn 23`: The key of an answer
#
# Questions to think about, or to try in this file. The answers are computed in
# `tutorials/answers/17_answer_once.py`.
#
# (An assertion may stop a script that you changed, as it guards what the text says of the original.
# Delete it then.)
#
# 1. In section 1, give ask() a key with which all six answers are right. What should it do with a
#    temperature and no seed?
# 2. In section 2, take blocks of 1, 4 and 64 tokens for the model. How many tokens are reused, and
#    how many hashes have to be computed and looked up?
# 3. In section 3, by threshold, compare the states of the last token instead of the embeddings:
#    x = big.model.hidden(np.array(ids))[-1], and x / np.linalg.norm(x). Are there fewer false hits
#    for as many hits (try other thresholds)? But what is left to be saved by a hit?
# 4. In section 4, let the small model answer all questions of 1 hop, and the big one the others. Is
#    that better than random routing at the same cost? Why (not)?
# 5. In section 5, let the second and third voter copy the first with probability 0.4, and vote
#    independently otherwise. How often is the majority right, if a voter is right with 0.7?
