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
went_back = "Tom was in the park. Anna was in the kitchen. Tom went to the garden."
variants = [
    ("another mood", STORY.replace("a boy", "a kind boy") + QUESTION),
    ("Rosa, not Anna", STORY.replace("Anna", "Rosa") + QUESTION),
    ("Anna elsewhere", STORY.replace("kitchen", "cellar") + QUESTION),
    ("Tom elsewhere", STORY.replace("park", "cellar") + QUESTION),
    ("Tom the other way", STORY[: STORY.index("Tom was")] + went_back + QUESTION),
    ("where is Anna?", STORY + QUESTION.replace("Tom", "Anna")),
    ("in other words", STORY.replace("Tom went", "After lunch Tom ran") + QUESTION),
]
stored, similar = embedding(big.model, prompt), {}
for name, question in variants:
    ids = big.encode(question)
    similar[name] = embedding(big.model, ids) @ stored
    answer = big.tokenizer.decode(big.generate(ids, 1)).strip()
    print(f"  {similar[name]:.4f}  {name:18} answer: {answer}")
assert similar["Tom the other way"] > 0.99999
assert similar["Tom elsewhere"] > similar["in other words"]
# The order of the words does not count, so the other way is the same prompt. Elsewhere is elsewhere,
# whether it is Tom, about whom we ask, or Anna. And other words are less similar than another fact.

# %% ... hits and false hits
# Now stories with questions. Each question is stored, and then comes a prompt in which a word of
# the story is another one, or which asks about something else of the story. It is a hit if its
# similarity reaches the threshold, and a false hit if the model would answer something else. The
# model answers all, to check (with a prefix cache, since prompts begin alike). Look for a threshold
# with many hits and no false ones.
title("... by threshold")
followers, same_answer = [], []
for question, *others in requests(big, 30, changes=2):
    answer = reusing.generate(question, 1)
    for ids in others:
        followers.append(embedding(big.model, ids) @ embedding(big.model, question))
        same_answer.append(reusing.generate(ids, 1) == answer)
followers, same_answer = np.array(followers), np.array(same_answer)
table = []
for threshold in (-1, 0.99, 0.999, 0.9995, 0.9999):
    hit = followers >= threshold
    hits, false = hit.sum(), (hit & ~same_answer).sum()
    rate, wrong_if_hit = hits / len(hit), false / max(hits, 1)
    shares = [f"{x:.1%}" for x in (wrong_if_hit, upper_bound(false, hits), rate * wrong_if_hit)]
    table.append([threshold, f"{rate:.0%}", f"{false} of {hits}", *shares])
print_table(["threshold", "hits", "false", "P(wrong | hit)", "at most", "wrong answers"], table)
print(f"{len(hit)} prompts. Similarity, from lowest to highest:")
for name, group in (("same answer", same_answer), ("another answer", ~same_answer)):
    lowest, middle, highest = np.quantile(followers[group], (0, 0.5, 1))
    print(f"  {name:14}  {lowest:.4f} to {highest:.4f}, median {middle:.4f}")
assert followers[~same_answer].max() > np.median(followers[same_answer])
assert table[0][2] != "0" and np.mean(followers[same_answer] < followers[~same_answer].max()) > 0.5
# No threshold separates them: the most similar prompt with another answer is more similar than half
# of those with the same one. (And here only the question itself was stored. Among many stored
# prompts more are similar: see the card.) What this means for a user is a product:
#
#     wrong answers = hit rate * P(wrong | hit)
#
# A hit rate alone says nothing. Nor does "none was wrong", without saying of how many:
# with 0 wrong ones among n, 1 - 0.05^(1 / n) is compatible at 95% ("at most" in the table).
checked = [30, 300, 3000]
limits = [upper_bound(0, n) for n in checked]
bar_chart([f"0 wrong of {n}: at most" for n in checked], limits, "{:.2%}")
assert abs(limits[1] - (1 - 0.05 ** (1 / 300))) < 1e-9 and 0.0099 < limits[1] < 0.01

# %% 4. Ask the small model first, by hand
# Nobody asked this before. Still, does it need the big model? Let the small one answer, look how
# sure it is, and ask the big one only where it is not. The small model costs 1, the big one 20; of
# the small answers 60% are kept. Every request pays 1, and 40% pay 20 as well.
title("4. A cascade, by hand")
kept_shares = (0, 0.05, 0.3, 0.6, 0.9)
costs = [1 + (1 - a) * 20 for a in kept_shares]
bar_chart([f"{a:.0%} kept" for a in kept_shares], costs, "{:.1f}")
print(f"60% kept: 1 + 0.4 * 20 = {1 + 0.4 * 20:.0f} instead of 20")
assert costs[1] == 20 and costs[0] > 20
# With 5% kept it costs as much as the big model alone: the share has to be above the ratio of the
# costs, 1 / 20. That is easy. The question is how many of the kept answers are wrong.

# %% ... the two models
# All answers in stories that take 0 hops (counts) to 3, and both models. A story is read once: the
# logits of each row predict the token after it, so one pass answers all of its questions. Where is
# the small model worse?
title("... the two models, by hops")


def answer_logits(lm, questions):
    """The logits (questions, V) for the answers. Prompts of a story are beginnings of its last."""
    found = []
    for number in dict.fromkeys(question.story for question in questions):
        lengths = [len(question.prompt) for question in questions if question.story == number]
        longest = next(q for q in questions if (q.story, len(q.prompt)) == (number, max(lengths)))
        found.append(lm.logits(longest.prompt)[np.array(lengths) - 1])
    return np.concatenate(found)


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


questions = questions_of(big, stories)
truth = np.array([question.answer[0] for question in questions])
hops = np.array([question.hops for question in questions])
p_small, p_big = softmax(answer_logits(small, questions)), softmax(answer_logits(big, questions))
small_right, big_right = p_small.argmax(-1) == truth, p_big.argmax(-1) == truth
table = [["all", len(truth), f"{small_right.mean():.0%}", f"{big_right.mean():.0%}"]]
for number in range(4):
    rows = hops == number
    rights = [f"{right[rows].mean():.0%}" for right in (small_right, big_right)]
    table.append([f"{number} hops" if number else "counts", rows.sum(), *rights])
print_table(["", "answers", "small right", "big right"], table)

works = []
for lm in (small, big):
    with counting(lm) as counts:
        lm.generate(prompt, 1)
    works.append(counts.total().multiply_adds)
c = works[0] / works[1]
print(f"An answer of the small model costs c = {c:.3f} of one of the big model.")
assert small_right.mean() < big_right.mean()

# %% ... does the small model know what it knows?
# How sure it is: the probability of its answer. Each column has 100%. If the columns did not
# overlap, a threshold between them would make no mistakes.
title("... how sure the small model is, when it is right and when it is wrong")
sure = p_small.max(-1)
edges = np.arange(11) / 10
right_share, wrong_share = (
    np.histogram(sure[rows], edges)[0] / rows.sum() for rows in (small_right, ~small_right)
)
largest = max(*right_share, *wrong_share)
print(f"  {'sure':9} {'right':31} wrong")
for i in range(10):
    bars = [
        f"{share[i]:4.0%} {bar(share[i], largest, 25):26}" for share in (right_share, wrong_share)
    ]
    print(f"  {edges[i]:.1f}-{edges[i + 1]:.1f}   {bars[0]}{bars[1]}".rstrip())
higher = sure[small_right][:, None] > sure[~small_right]
print(
    f"A right answer is surer than a wrong one in {higher.mean():.0%} of all pairs (chance: 50%)."
)
assert higher.mean() > 0.55

# %% ... a threshold
# The columns overlap, but they differ. Now thresholds that keep 20% to 80% of the answers in
# calibration stories; what happens in the held-out ones? Beside it two others at the same cost. A
# router decides before anybody answers, by a logistic regression on the last words of the prompt
# that was trained to predict whether the small model will be right. And random routing. Both are
# cheaper: where they send a question to the big model, the small one never runs. For the same cost
# they ask the big model more often.
title("... answers right at the same cost: cascade, router, random")
examples = questions_of(big, calibration_stories(40))
p_examples = softmax(answer_logits(small, examples))
known = p_examples.argmax(-1) == [example.answer[0] for example in examples]
pairs = [Example(example.prompt, None, right) for example, right in zip(examples, known)]
w, b = learned(PromptTokens(), small.model, pairs, np.float32)
easy = np.array([PromptTokens()(small.model, None, q.prompt) @ w + b for q in questions])
order = np.argsort(-easy)  # the easiest first


def mixed(by_small):
    return np.where(by_small, small_right, big_right).mean()


ends = small_right.mean(), big_right.mean()  # of the small model alone, and of the big one
lines = {name: [ends[0]] for name in ("cascade", "router", "random")}
costs, table = [c], []
for share in (0.8, 0.6, 0.4, 0.2):
    threshold = np.quantile(p_examples.max(-1), 1 - share)
    kept = sure >= threshold
    costs.append(c + (1 - kept.mean()))
    to_small = min((1 - costs[-1]) / (1 - c), 1)  # routing this share costs as much
    routed = np.isin(np.arange(len(order)), order[: round(to_small * len(order))])
    lines["cascade"].append(mixed(kept))
    lines["router"].append(mixed(routed))
    lines["random"].append(to_small * ends[0] + (1 - to_small) * ends[1])
    accuracies = [f"{values[-1]:.1%}" for values in lines.values()]
    table.append([f"{threshold:.2f}", f"{kept.mean():.0%}", f"{costs[-1]:.2f}", *accuracies])
print_table(["threshold", "kept", "cost", *lines], table)
print(f"small model alone: {c:.2f}, {ends[0]:.1%}; big model alone: 1.00, {ends[1]:.1%}")
gain, gain_of_router = (
    np.mean(lines[name]) - np.mean(lines["random"]) for name in ("cascade", "router")
)
for values in lines.values():
    values.append(ends[1])
save_lines(
    "17_accuracy_over_cost", [*costs, 1], lines, "cost (big model = 1)", "share of right answers"
)
assert gain > 0
# The cascade is better than random routing: its threshold knows something. But each point below
# the big model's accuracy is a wrong answer that the small model was sure of, and nobody notices.
# The router sees words, not the answer. Who was where stands far before the question, and whether
# the small model has kept track of it does not show in the last words. So it is nearer to random.
# (All of this is about two models and their questions: with a better small model, all of it moves.)

# %% ... with the flag
# `cascade` chooses its threshold by itself, from calibration prompts and a budget: here 0.5 of the
# big model's work. By default the prompts are stories that are cut anywhere, before a name or after
# an article. Or we give it questions. It keeps half of the answers in both cases, it believes. How
# many does it keep of questions that it has not seen?
title("... load('stories', cascade=...), at a budget of 0.5")
options = {"budget": 0.5, "stories": 8}
by_text = minitx.load("stories", cascade=options)
texts = [question.prompt + question.answer for question in examples[::4]]  # cut before the answer
options = {"budget": 0.5, "stories": len(texts), "cuts": 1}
by_questions = minitx.load("stories", calibrate=texts, cascade=options)
asked = questions[::10]
with counting(big) as alone:
    expected = [big.generate(question.prompt, 1) for question in asked]
table = []
for name, cascade in (("stories, cut anywhere", by_text), ("questions", by_questions)):
    with counting(cascade) as counts:
        given = [cascade.generate(question.prompt, 1) for question in asked]
    work = counts.total().multiply_adds / alone.total().multiply_adds
    same = np.mean([one == other for one, other in zip(given, expected)])
    kept = f"{counts.events['small answers kept']} of {len(asked)}"
    table.append([name, kept, f"{work:.2f}", f"{same:.0%}"])
print_table(["calibrated on", "kept", "work", "same as big"], table)
# A threshold holds for the kind of prompt that it was chosen for. Calibrate on your own.

# %% ... token by token
# A cascade decides about a whole answer, and forgets what the small model has written if it is not
# sure. For a long text one can decide token by token: in `big_little` the small model writes while
# it is sure, then the big one reads all of that in one pass. It replaces a token with the
# probability P if -ln P is above `rollback`. With a rollback below ln 2 = 0.693, a token that stays
# has P > 1/2, so it is the most likely one: then the text is the big model's own.
little = minitx.load("stories", big_little={"rollback": 0.69})
with counting(little) as counts:
    written = little.generate(prompt, 40)
assert written == big.generate(prompt, 40)
print(
    f"{len(written)} tokens, {counts.events['big model passes']} passes of the big model, ", end=""
)
print(f"{counts.events['draft tokens kept']} tokens by the small one; the same text as ever")
assert counts.events["big model passes"] < len(written)
# With a looser rollback (default: 2) it is an approximation, as the cascade is.

# %% 5. Ask several times, by hand
# The last one spends work instead of saving it, to be right more often: sample an answer several
# times and take the most frequent one. Three voters, each right with probability 0.7 or 0.4,
# independent of each other. We go through all eight outcomes: yes means right.
title("5. The majority of three, by hand")
for p in (Fraction(7, 10), Fraction(4, 10)):
    majority_right = Fraction(0)
    for votes in product((True, False), repeat=3):
        probability = Fraction(1)
        for vote in votes:
            probability *= p if vote else 1 - p
        if sum(votes) >= 2:
            majority_right += probability
    print(f"  one is right: {float(p):.3f}   the majority: {float(majority_right):.3f}")
    assert np.isclose(float(majority_right), majority_accuracy(float(p), 3))
# 0.784 and 0.352. Above one half voting helps, below one half it hurts: a majority is wrong more
# reliably. What does it do on stories, where there are more than two possible answers?

# %% ... on stories
# We have the small model's distribution for each answer, so we can draw votes without another pass:
# at temperature 0.7, as the flag does. The greedy answer is the most likely word. Look at the
# questions whose greedy answer is right, and at those where it is wrong.
title("... votes of the small model: how many answers are right")
vote_p = softmax(np.log(p_small) / 0.7)
rng = np.random.default_rng(0)
votes = np.array([rng.choice(len(row), 101, p=row / row.sum()) for row in vote_p.astype(float)])
table, rights = [], {}
for number in (1, 3, 9, 101):
    majority = np.array([Counter(row[:number].tolist()).most_common(1)[0][0] for row in votes])
    rights[number] = majority == truth
    groups = (rights[number][rows] for rows in (slice(None), small_right, ~small_right))
    table.append([f"{number} votes", *(f"{right.mean():.0%}" for right in groups)])
table.append(["greedy", f"{small_right.mean():.0%}", "100%", "0%"])
print_table(["", "all", "greedy right", "greedy wrong"], table)
assert rights[101][small_right].mean() > rights[1][small_right].mean()
assert rights[101][~small_right].mean() < rights[1][~small_right].mean()
# Votes come back to the most likely word: right where that is right, wrong where it is wrong. For
# an answer of one word, that is what greedy decoding says at once, for one pass. Voting pays where
# many ways lead to an answer, a long calculation, and wrong ways to different wrong answers. Our
# models write no such ways.

# %% ... with the flag, and what it costs
# Up to 9 votes after one pass over the prompt. It stops when the others cannot change the result.
title("... load(..., majority_vote=...): one question")
table = []
for name in ("stories-draft", "stories"):
    alone = minitx.load(name)
    voting = minitx.load(name, majority_vote={"votes": 9})
    with counting(alone) as once:
        alone.generate(prompt, 1)
    with counting_calls(voting) as passes, counting(voting) as counts:
        voting.generate(prompt, 1)
    work = counts.total().multiply_adds / once.total().multiply_adds
    table.append([name, counts.events["votes cast"], passes["model"], f"{work:.2f}"])
    assert 5 <= counts.events["votes cast"] <= 9 and work > 1
print_table(["", "votes cast", "passes", "work (greedy = 1)"], table)
# A vote of one word is one more token after a prompt that is read once, so here it is cheap. After
# an answer of 200 words, 9 votes are 9 times the work.

# %% 6. What is skipped, what must match, what can go wrong
title("6. All five")
rows = [
    ("answer cache", "everything", "the whole request", "a key that forgets something"),
    ("prefix cache", "most of the prompt", "the first tokens", "memory; nothing else"),
    ("semantic cache", "everything", "roughly the words", "another question's answer"),
    ("cascade", "the big model", "nothing", "a wrong answer that was sure"),
    ("router", "the big model", "nothing", "a prompt that looked easy"),
    ("majority vote", "nothing", "nothing", "voters wrong in the same way"),
]
for row in [("", "skipped", "must match", "can go wrong"), *rows]:
    print(f"  {row[0]:15} {row[1]:19} {row[2]:18} {row[3]}")
# The first two are exact: turn them on and nobody can tell, except by the bill. The others trade
# wrong answers for work, so measure both: hit rate and false hits, cost and accuracy, on questions
# like yours, beside a random choice at the same cost. "Good enough" is then a number that you chose.

# %% Try this
# An assertion may fail when you change things; delete it then.
#
# 1. In section 1, write a key into ask() that makes all six answers right. (str(settings) depends on
#    the order of the settings, and the model needs a name of its own.) What do you do with a
#    temperature without a seed?
# 2. In section 2, take blocks of 1 token and of 64. How many tokens are reused, and what does the
#    store have to look up and keep more of?
# 3. In section 3, serve the answer of the most similar of all stored questions, instead of the one
#    that was stored just before. Do hits become more frequent, and false hits, too?
# 4. In section 4, let the small model answer only questions with 1 hop (question.kind tells). Is
#    that better than random routing at the same cost? And with the threshold on top?
# 5. In section 5, let two voters copy the first one: majority_accuracy(0.7, 3, copying=1). Then how
#    much copying may there be if three voters are to reach 0.75?
