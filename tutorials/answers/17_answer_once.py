# %% [markdown]
"""Answers to the questions of tutorial 17."""

# %%
from fractions import Fraction
from hashlib import sha256
from itertools import product

import numpy as np
from helpers import QUESTION, STORY, borrow, held_out_stories, load_stories, print_table, say, title

import minitx
from minitx.lab.answers import questions_of
from minitx.lab.semantic_hits import requests
from minitx.ledger import counting
from minitx.skip.semantic_cache import embedding
from minitx.training.stories.grammar import NAMES
from minitx.tree import weights

big, small = load_stories(), minitx.load("stories-draft")
prompt = big.encode(STORY + QUESTION)
stories = held_out_stories(12)

# %% [markdown]
# ## Question 1
#
# With which key are all six answers right?
#
# With one that holds everything that can change an answer: the prompt, the limit, temperature and
# seed, and the weights (a hash of all of them). At a temperature without a seed, each answer is
# meant to be another draw, so it must be neither served nor stored.

# %%
title("Question 1. A key that leaves nothing out")
answers = {}


def hash_of_weights(lm):
    found = sha256()
    for name, array in sorted(weights(lm.model).items()):
        found.update(name.encode() + array.tobytes())
    return found.hexdigest()


def ask(lm, ids, limit, temperature=0.0, seed=None):
    """The answer, and whether it was stored before."""
    if temperature > 0 and seed is None:
        return lm.generate(ids, limit, temperature=temperature), False
    key = hash_of_weights(lm), tuple(ids), int(limit), float(temperature), seed
    hit = key in answers
    if not hit:
        answers[key] = lm.generate(ids, limit, temperature=temperature, seed=seed)
    return answers[key], hit


low_rank = minitx.load("stories", low_rank={"rank": 8, "weighted": False})
wanted = [
    ("4 tokens", big, 4, {}),
    ("the same again", big, 4, {}),
    ("6 tokens", big, 6, {}),
    ("temperature 2, seed 1", big, 4, {"temperature": 2, "seed": 1}),
    ("temperature 2, seed 2", big, 4, {"temperature": 2, "seed": 2}),
    ("other weights", low_rank, 4, {}),
]
hits = []
for name, lm, limit, settings in wanted:
    served, hit = ask(lm, prompt, limit, **settings)
    right = lm.generate(prompt, limit, **settings)
    hits.append(hit)
    print(
        f"  {name:21} {'hit' if hit else 'miss':4}  served: {big.tokenizer.decode(served).strip()}"
    )
    assert served == right, f"{name}: the answer to another request"
assert hits == [False, True, False, False, False, False]
ask(big, prompt, 4, temperature=2)
assert len(answers) == 5, "without a seed, nothing is stored"

# %% [markdown]
# ## Question 2
#
# What do blocks of 1, 4 and 64 tokens reuse?
#
# Only full blocks are reused, so small blocks reuse nearly all that two prompts have in common, and
# large ones lose up to a block. But each full block of a prompt has a hash, which is computed and
# looked up: one per token with blocks of 1. 16 is between the two.

# %%
title("Question 2. The size of a block")
text = stories[3].text
people = [name for name in NAMES if f" {name} " in text][:2]
first, second = (big.encode(f"{text} Where is {name}? {name} is in the") for name in people)
common = next(i for i, (a, b) in enumerate(zip(first, second)) if a != b)
print(f"The two prompts have {common} tokens in common, of {len(second)}.")
table, reused = [], {}
for block in (1, 4, 16, 64):
    reusing = minitx.load("stories", prefix_cache={"block": block})
    reusing.generate(first, 1)
    with counting(reusing) as counts:
        reusing.generate(second, 1)
    reused[block] = counts.events["prompt tokens reused"]
    table.append([block, reused[block], len(second) // block])
print_table(["block", "tokens reused", "full blocks of the prompt: hashes"], table)
assert all(found == common // block * block for block, found in reused.items())

# %% [markdown]
# ## Question 3
#
# Does the last hidden state have fewer false hits?
#
# Yes: it knows what is asked, and the words alone do not. Whatever the threshold, we want prompts
# with the same answer to be more similar than those with another, so we compare all pairs of one of
# each kind. And of the most similar third we count the false hits.
#
# But nothing is left to be saved. The state is what the whole model makes of the prompt, and the
# answer only takes one more product, with the head. The embeddings need no layer at all.

# %%
title("Question 3. Embeddings and last hidden states, for as many hits")


def state_and_answer(ids):
    """The direction of the last hidden state, and the token that the model says after it."""
    x = big.model.hidden(np.array(ids))[-1]
    return x / np.linalg.norm(x), int(big.model.head(big.model.norm(x)).argmax())


similar, same = [], []
for question, *others in requests(big, 6, changes=2):
    state, answer = state_and_answer(question)
    for ids in others:
        other_state, other_answer = state_and_answer(ids)
        words = embedding(big.model, question) @ embedding(big.model, ids)
        similar.append([words, state @ other_state])
        same.append(answer == other_answer)
similar, same = np.array(similar), np.array(same)
table, false, ordered = [], [], []
for name, scores in zip(("embeddings", "last hidden state"), similar.T):
    hit = np.argsort(-scores)[: len(same) // 3]
    false.append(np.sum(~same[hit]))
    ordered.append(np.mean(scores[same][:, None] > scores[~same]))
    table.append([name, f"{ordered[-1]:.0%}", f"{false[-1]} of {len(hit)}"])
print_table(["", "pairs in order", "false hits"], table)
with counting(big) as counts:
    big.model.next_argmax(prompt, big.model.new_state())
entries = counts.entries.items()
head = sum(entry.multiply_adds for path, entry in entries if "head" in path)
left = head / counts.total().multiply_adds
say(f"{np.sum(~same)} of {len(same)} have another answer. A hit saves {left:.1%} of the work.")
assert ordered[0] < ordered[1] and false[1] <= false[0] and left < 0.05

# %% [markdown]
# ## Question 4
#
# Is it better than random routing to give the small model all questions of 1 hop?
#
# No. What counts is not whether a question is easy for the big model, but how many right answers
# are lost if the small one gets it. On questions of 1 hop that is no less than on the others. The
# small model does not fail at chaining facts: it fails at keeping track of one.

# %%
title("Question 4. Questions of 1 hop to the small model")
questions = questions_of(big, stories)
answer_logits = borrow("17", "answer_logits")
truth = np.array([question.answer[0] for question in questions])
one_hop = np.array([question.hops == 1 for question in questions])
small_right, big_right = (answer_logits(lm, questions).argmax(-1) == truth for lm in (small, big))
by_hops = np.where(one_hop, small_right, big_right).mean()
share = one_hop.mean()
random = share * small_right.mean() + (1 - share) * big_right.mean()
lost = [big_right[rows].mean() - small_right[rows].mean() for rows in (one_hop, ~one_hop)]
print(f"{share:.0%} of {len(truth)} questions go to the small model.")
print(f"right: {by_hops:.1%} by hops, {random:.1%} at random")
print(f"lost to the small model: {lost[0]:.0%} of those with 1 hop, {lost[1]:.0%} of the others")
assert by_hops - random < 0.02
assert np.isclose(random - by_hops, share * (1 - share) * (lost[0] - lost[1]))

# %% [markdown]
# ## Question 5
#
# How often is the majority right, if two voters copy the first with probability 0.4?
#
# 0.730, where independent voters have 0.784 and one alone 0.7. A copied vote says nothing new: it
# follows the first, right or wrong. If the first is right (0.7), each of the others is right with
# 0.4 + 0.6 * 0.7 = 0.82, and at least one of them with 1 - 0.18^2 = 0.9676. If it is wrong, both
# must be right: (0.6 * 0.7)^2 = 0.1764. So 0.7 * 0.9676 + 0.3 * 0.1764 = 0.7302.

# %%
title("Question 5. Voters that copy")
p = Fraction(7, 10)


def majority(copy):
    """The probability that at least two of three votes are right."""
    found = Fraction(0)
    for votes in product((True, False), repeat=3):
        probability = p if votes[0] else 1 - p
        for vote in votes[1:]:
            own = p if vote else 1 - p
            probability *= copy * (vote == votes[0]) + (1 - copy) * own
        found += probability * (sum(votes) >= 2)
    return found


for copy in (Fraction(0), Fraction(4, 10), Fraction(1)):
    print(
        f"copied with probability {float(copy)}: the majority is right with {majority(copy)}",
        end="",
    )
    print(f" = {float(majority(copy)):.4f}")
assert majority(0) == Fraction(784, 1000) and majority(1) == p
assert majority(Fraction(4, 10)) == Fraction(73024, 100000)
