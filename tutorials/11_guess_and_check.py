# %% [markdown]
"""Tutorial 11: guess and check. Can a small model's guesses save passes of the large model without
changing its text?

Tutorial 2 timed a pass of the model over 4 tokens, which are 4 rows in each product: it takes much
less time than 4 passes over one. But a single text gives one row at a time, since each token is
needed before the one after it. Unless somebody guesses the next tokens: then one pass of the large
model checks them all. This is speculative decoding. The small model is the draft model, the large
one the target model.

Guesses can also come from the first layers of the model itself, from the text, or from the model's
own past mistakes: tutorial 18.

Letters: V vocabulary; p the target model's distribution of the next token (V numbers), q the draft
model's; gamma guesses per pass; alpha the probability that a guess is accepted.
"""

# %% [markdown]
# ## Two models with one vocabulary

# %%
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import numpy as np
from helpers import (
    QUESTION,
    STORY,
    bar,
    bar_chart,
    decode_last,
    held_out_stories,
    load_stories,
    print_table,
    save_lines,
    say,
    time_side_by_side,
    title,
)

import minitx
from minitx.build import random_model
from minitx.decode import Sampler
from minitx.lab.rows import config_of
from minitx.ledger import counting
from minitx.memory_layout import to_column_major
from minitx.tree import weights

target = load_stories()
draft = minitx.load("stories-draft")
sizes = [sum(w.size for w in weights(lm.model).values()) for lm in (target, draft)]
print(f"target model: {sizes[0]:,} weights in {len(target.model.stack.blocks)} blocks")
print(f"draft model:  {sizes[1]:,} weights in {len(draft.model.stack.blocks)} blocks")

# %% [markdown]
# ## 1. One guess, by hand
#
# Four words, and two opinions about which comes next. The draft model draws a word from q. The
# target model may keep it or throw it away, and the words that come out must be distributed as p:
# nobody may be able to tell that there was a draft model. All numbers are fractions, so nothing is
# rounded.

# %%
title("1. One guess, by hand")
WORDS = ("park", "kitchen", "garden", "cave")
p = [Fraction(6, 10), Fraction(3, 10), Fraction(1, 10), Fraction(0)]
q = [Fraction(4, 10), Fraction(2, 10), Fraction(2, 10), Fraction(2, 10)]

# %% [markdown]
# The rule: accept the guess x with probability min(1, p(x) / q(x)). A word that is at least as
# probable in p as in q is always accepted. "garden" is guessed twice as often as it should be, so
# half of its guesses are rejected. "cave" must never come out, so all of its are.

# %%
accept = [min(Fraction(1), p_x / q_x) for p_x, q_x in zip(p, q)]

# %% [markdown]
# After a rejection another word is drawn, from the residual distribution: what is left of p where
# it is above q (2/10 for park, 1/10 for kitchen), scaled to sum 1.

# %%
excess = [max(Fraction(0), p_x - q_x) for p_x, q_x in zip(p, q)]
residual = [e / sum(excess) for e in excess]
table = [[WORDS[i], *map(str, (p[i], q[i], accept[i], residual[i]))] for i in range(4)]
print_table(["word", "p", "q", "accept", "residual"], table)

# %% [markdown]
# ## ... and all that can happen
#
# We go through every guess, accepted or not, and add up how often each word comes out. It should be
# as often as in p: 6, 3, 1 and 0 of 10.

# %%
output = [Fraction(0)] * 4
for guess in range(4):
    output[guess] += q[guess] * accept[guess]
    rejected = q[guess] * (1 - accept[guess])
    for word in range(4):
        output[word] += rejected * residual[word]
print("comes out:", ", ".join(f"{word} {share}" for word, share in zip(WORDS, output)))
assert output == p  # exactly

acceptance = sum(q_x * a_x for q_x, a_x in zip(q, accept))
assert acceptance == sum(map(min, p, q))
print(f"a guess is accepted with probability {acceptance}, the sum of min(p, q)")

# %% [markdown]
# (To draw from p itself after a rejection would be wrong. The accepted guesses of "garden" are
# 1/5 * 1/2 = 1/10 of all words, as many as p allows. It must not be drawn again.)

# %% [markdown]
# ## 2. Several guesses, one pass
#
# The draft model guesses gamma tokens in a row. One pass of the target model over all of them gives
# its own distribution after each. Guesses are accepted up to the first rejection; the rest is
# thrown away. A rejected guess is replaced by a draw from the residual distribution, so each pass
# brings at least one token. If all are accepted, the last row of the pass gives one token more, for
# free.
#
# Say that each guess is accepted with probability alpha. Guess 1 counts with probability alpha,
# guess 2 only if both are accepted, alpha^2, and so on. One token comes in any case. So a pass
# brings 1 + alpha + alpha^2 + ... + alpha^gamma tokens on average. How much do more guesses add?

# %%
title("2. Tokens from one pass, by formula")


def tokens_per_pass(alpha, gamma):
    return sum(alpha**i for i in range(gamma + 1))


GAMMAS = (0, 1, 2, 4, 8)
ALPHAS = (0.5, 0.7, 0.9)
table, lines = [], {}
for alpha in ALPHAS:
    tokens = [tokens_per_pass(alpha, gamma) for gamma in GAMMAS]
    table.append([alpha, *(f"{number:.2f}" for number in tokens)])
    lines[f"alpha = {alpha}"] = tokens
print_table(["alpha", *(f"gamma = {gamma}" for gamma in GAMMAS)], table)
save_lines("11_tokens_per_pass", GAMMAS, lines, "guesses per pass (gamma)", "tokens per pass")

# %% [markdown]
# With alpha = 0.5, 8 guesses bring hardly more than 4, and at 0.9 half as much again. Many guesses
# pay only if nearly all are right: one wrong guess spoils those after it.

# %% [markdown]
# ## 3. The same with the two models
#
# Greedy decoding first, where the rule is simple: a guess is accepted if it is the target model's
# own most likely token. To be short, this loop has no KV cache.


# %%
def greedy_pass(text, gamma):
    """The tokens that one pass of the target model adds to the text, its own one last."""
    guesses = []
    for _ in range(gamma):
        guesses.append(int(draft.logits(text + guesses)[-1].argmax()))
    logits = target.logits(text + guesses)[len(text) - 1 :]  # (gamma + 1, V) in one pass
    own = logits.argmax(-1).tolist()  # what the target model says after text, after guess 1, ...
    accepted = 0
    while accepted < gamma and guesses[accepted] == own[accepted]:
        accepted += 1
    return guesses[:accepted] + [own[accepted]]


# %% [markdown]
# ## ... pass by pass
#
# Each line is one pass of the target model: accepted guesses, then a token of its own, in the place
# of the first wrong guess. What kind of words are these?

# %%
title("3. One story, pass by pass (greedy, gamma = 4)")
prompt = target.encode(STORY + QUESTION)
text, passes = list(prompt), 0
while len(text) < len(prompt) + 40:
    new = greedy_pass(text, 4)
    text += new
    passes += 1
    accepted, own = target.tokenizer.decode(new[:-1]), target.tokenizer.decode(new[-1:])
    print(f"  {len(new) - 1} accepted |{accepted:28}| then {own.strip()}")
new = text[len(prompt) :]
assert new == target.generate(prompt, len(new))  # the target model's own text, token for token
print(f"{len(new)} tokens in {passes} passes; the target model alone writes the same text.")

# %% [markdown]
# The draft model misses where somebody is (park, kitchen), and what happens next (five carrots).
# The common phrases it knows: there four guesses are accepted, and a pass brings five tokens.

# %% [markdown]
# ## 4. How often do the models agree?
#
# When tokens are sampled, alpha is the sum of min(p, q), as in section 1. To know it, nothing has
# to be guessed: run both models over a text and compare their distributions at every token. Below
# are the question and what was generated, with the alpha of a guess there. Where do the models
# agree?

# %%
title("4. The probability that a guess is accepted, token by token")
sampler = Sampler(temperature=1)


def agreement(ids):
    """alpha for each token but the first: the probability that a guess there is accepted."""
    alphas = []
    for target_logits, draft_logits in zip(target.logits(ids[:-1]), draft.logits(ids[:-1])):
        p, q = sampler.probabilities(target_logits), sampler.probabilities(draft_logits)
        alphas.append(np.minimum(p, q).sum())
    return alphas


words = [target.tokenizer.decode([token]).strip() for token in text]
alphas = agreement(text)
for t in range(len(prompt) - 8, len(prompt) + 8):
    alpha = alphas[t - 1]  # the first token has none
    print(f"  {words[t]:10} {alpha:4.0%} {bar(alpha, 1.0, 50)}")

stories = [target.encode(story.text) for story in held_out_stories(8)]
alpha = np.mean(np.concatenate([agreement(ids) for ids in stories]))
print(f"On average over {len(stories)} held-out stories: alpha = {alpha:.2f}")

# %% [markdown]
# Grammar is easy to guess. Where somebody is, is not: the target model is sure of "park" after 4 of
# its 8 blocks (tutorial 1, section 5), and the draft model has 2.

# %% [markdown]
# ## 5. With the flag
#
# The technique `speculative` does the same with KV caches for both models, and samples by the rule
# of section 1. The ledger notes how many guesses were proposed and accepted. (stop=0: always guess
# gamma tokens. Section 7 is about that.)

# %%
GAMMA = 4
guessing = minitx.load("stories", speculative={"gamma": GAMMA, "stop": 0})
prompts = [ids[:40] for ids in stories]


def write(lm, temperature=0):
    """Continue all prompts by 60 tokens; returns the new tokens of each, and the ledger."""
    with counting(lm) as counts:
        new = [
            lm.generate(ids, 60, temperature=temperature, seed=seed)
            for seed, ids in enumerate(prompts)
        ]
    return new, counts


# %% [markdown]
# ## ... what to look at
#
# Guesses and tokens per pass: without guessing, a pass brings 1. And all multiply-adds, of both
# models and with the reading of the prompts, relative to the target model alone.


# %%
class Cost(NamedTuple):
    proposed: float  # guesses per pass
    tokens: float  # per pass
    work: float  # multiply-adds per new token, relative to the target model alone


def cost(new, counts, alone):
    """alone: what ``write(target)`` returned at the same temperature."""
    tokens, tokens_alone = sum(map(len, new)), sum(map(len, alone[0]))
    passes = counts.events["target passes"]
    work = counts.total().multiply_adds / tokens
    work_alone = alone[1].total().multiply_adds / tokens_alone
    proposed = counts.events["draft tokens proposed"]
    return Cost(proposed / passes, tokens / passes, work / work_alone)


# %% [markdown]
# ## ... greedy and sampled
#
# A pass of section 3 brought 3.3 tokens. And here? Are more guesses accepted in greedy decoding, or
# in sampling?

# %%
title("5. load('stories', speculative=...): counts on held-out stories")
alone = write(target)
table = []
for name, temperature, expected in (("greedy", 0, alone), ("temperature 1", 1, write(target, 1))):
    new, counts = write(guessing, temperature)
    found = cost(new, counts, expected)
    accepted = counts.events["draft tokens accepted"] / counts.events["draft tokens proposed"]
    table.append([name, f"{accepted:.0%}", f"{found.tokens:.2f}", f"{found.work:.2f}"])
    assert found.tokens > 1
    if temperature == 0:
        assert new == alone[0]
        costs = {"gamma = 4": found}
print_table(["", "accepted", "tokens per pass", "multiply-adds (alone = 1)"], table)
print(
    f"By the formula for alpha = {alpha:.2f}: {tokens_per_pass(alpha, GAMMA):.2f} tokens per pass"
)

# %% [markdown]
# The formula is for sampling, and a good guide though alpha differs from token to token. Greedy
# decoding accepts less: where two words are about equally likely, the models' distributions may
# nearly agree and yet have different most likely words. The multiply-adds are the first part of the
# price. They are above 1, since the draft model works, too, and since the rejected guesses were
# work for nothing, in both models.

# %% [markdown]
# ## 6. Is sampled text still distributed as p?
#
# A test: after one beginning, draw the next word 250 times, with a guess each time, and count. It
# should be hard for the technique. So of all places in the text of section 4 at which the target
# model is in doubt, we take the one where the two models agree least. A share of 250 draws has a
# standard error of sqrt(p (1 - p) / 250). Are the drawn shares those of p, or of q?

# %%
title("6. The next word, drawn 250 times with guess and check")
DRAWS = 250
likeliest = [sampler.probabilities(logits).max() for logits in target.logits(text[:-1])]
in_doubt = np.array(likeliest) < 0.7
beginning = text[: 1 + np.argmin(np.where(in_doubt, alphas, 1))]
print(f"... {target.tokenizer.decode(beginning[-12:]).strip()} ...")
p = sampler.probabilities(target.logits(beginning)[-1])
q = sampler.probabilities(draft.logits(beginning)[-1])
count = np.zeros(len(p))
for seed in range(DRAWS):
    # 2 tokens, so that there is a guess to check: for a last token nobody guesses.
    next_word = guessing.generate(beginning, 2, temperature=1, seed=seed)[0]
    count[next_word] += 1

table = []
for token in np.argsort(-p)[:3]:
    drawn, error = count[token] / DRAWS, np.sqrt(p[token] * (1 - p[token]) / DRAWS)
    word = target.tokenizer.decode([token]).strip()
    table.append([word, f"{q[token]:.1%}", f"{p[token]:.1%}", f"{drawn:.1%}", f"{error:.1%}"])
    assert abs(drawn - p[token]) < 4 * error
print_table(["word", "q", "p", "drawn", "standard error"], table)

# %% [markdown]
# They follow p, to within two standard errors or so, and are far from q. The text is the target
# model's, although the guesses come from q.

# %% [markdown]
# ## 7. When to stop guessing
#
# A guess counts only if all guesses before it were right. Say that the draft model gives its five
# guesses the probabilities below, its confidence, and that it is right that often. Then the
# probability that guess 3 counts is 0.9 * 0.9 * 0.4 = 0.324: its own confidence times those before.
# Which guesses are worth their work?

# %%
title("7. When to stop guessing: five guesses by hand")
confidence = np.array([0.9, 0.9, 0.4, 0.9, 0.9])
counts_for = np.cumprod(confidence)
labels = [f"guess {i + 1}: {confidence[i]}" for i in range(5)]
bar_chart(labels, counts_for, "{:.2f}")
assert round(counts_for[2], 3) == 0.324

# %% [markdown]
# Guesses 4 and 5 are as confident as the first two and worth a third of them: they hang on guess 3.
# So stop after the first unsure guess. (After, not before it. It has been drawn, and to drop a
# guess *because* it was unlikely would change the distribution of those that are left.)

# %% [markdown]
# ## Is the draft model unsure where it is wrong?
#
# Both models over the same text, the target model's greedy one. We sort the tokens by the draft
# model's confidence in its most likely token. A bar is the share of those that are right: the
# target model's own token.

# %%
title("The draft model's confidence, and how often it is right")
confidences, right = [], []
for ids, new in zip(prompts, alone[0]):
    for logits, token in zip(draft.logits(ids + new[:-1])[len(ids) - 1 :], new):
        q = sampler.probabilities(logits)
        confidences.append(q.max())
        right.append(q.argmax() == token)
confidences, right = np.array(confidences), np.array(right)

labels, shares = [], []
for low, high in ((0, 0.3), (0.3, 0.6), (0.6, 0.9), (0.9, 1)):
    inside = (low < confidences) & (confidences <= high)
    labels.append(f"{low} to {high}, {np.mean(inside):4.0%} of all")
    shares.append(np.mean(right[inside]) if inside.any() else 0)
bar_chart(labels, shares, "{:.0%}")
sure = confidences > 0.6
assert np.mean(right[sure]) > np.mean(right[~sure])

# %% [markdown]
# Where it is sure, it is nearly always right. Where it is unsure, it is wrong more often, but far
# from always: where several words are about equally likely, both models may have the same favorite.

# %% [markdown]
# ## ... the threshold `stop`
#
# Up to 8 guesses, and no more after one with a confidence below `stop`. The guesses that are not
# accepted are wasted. What does a threshold save, and what does it cost? (Even without one, a pass
# has a little less than gamma guesses: near the limit of 60 tokens, fewer are needed.)

# %%
title("gamma = 8, and a threshold for the confidence (greedy)")
for stop in (0, 0.3, 0.6):
    changed = minitx.load("stories", speculative={"gamma": 8, "stop": stop})
    new, counts = write(changed)
    costs[f"gamma = 8, stop = {stop}"] = cost(new, counts, alone)
    assert new == alone[0]
table = []
for name, found in costs.items():
    wasted = found.proposed - (found.tokens - 1)  # one token of a pass is the target's own
    row = [f"{number:.2f}" for number in (found.tokens, found.proposed, wasted, found.work)]
    table.append([name, *row])
print_table(["", "tokens per pass", "guesses", "wasted", "multiply-adds"], table)
always, default = costs["gamma = 8, stop = 0"], costs["gamma = 8, stop = 0.3"]
assert default.proposed < always.proposed and default.tokens <= always.tokens

# %% [markdown]
# With a threshold, a pass guesses far where the text is easy, and stops early where it is not. It
# wastes fewer guesses, and brings fewer tokens: an unsure guess may be right, after all. Which is
# better depends on what a step of the draft model costs, and what a row in the pass.

# %% [markdown]
# ## 8. The price of a few rows at once
#
# A pass brings several tokens, but it runs gamma + 1 rows instead of one. How much longer does that
# take? The more rows, the more multiply-adds. But a matrix also has to come from memory to the
# processor, and that can take longer than to multiply by it. How often must it come?
#
# Take the head of a model with D = 288 and a vocabulary of 32,000, which is too large for the cache
# of one core. (Its weights are random; the time is that of trained ones.) A product with one row of
# x reads all of it. Five rows, one after another, read it five times. Or we cut it into blocks of
# 400 rows (0.5 MB), small enough to stay in the cache, and multiply all five rows by a block before
# we go on to the next: then it comes from memory once.

# %%
large = to_column_major(random_model(config_of("288x6")))
W = large.head.w  # (V, D): a row for each token of the vocabulary


def row_by_row(x):
    return np.stack([W @ row for row in x])  # (rows, V)


def block_by_block(x, height=400):
    y = np.empty((len(x), len(W)), np.float32)
    for a in range(0, len(W), height):
        block = W[a : a + height]  # the first row brings it into the cache, the others find it
        for row, result in zip(x, y):
            result[a : a + height] = block @ row
    return y


# %% [markdown]
# ## ... one matrix
#
# Both do the same multiply-adds. In which one does each row cost as much as the first?

# %%
title("8. Several rows times a matrix, the time of one row = 1")
ROWS = (1, 2, 3, 5, 9)
x = np.random.default_rng(0).standard_normal((max(ROWS), large.config.width)).astype(np.float32)
assert np.allclose(row_by_row(x[:3]), block_by_block(x[:3]), atol=1e-4)


def relative_times(run, arguments, repeats=6):
    """How long ``run`` takes for each of the arguments, relative to the first."""
    tasks = [partial(run, argument) for argument in arguments]
    times = time_side_by_side(*tasks, repeats=repeats, own_time=True)
    return [seconds / times[0] for seconds in times]


table = []
for name, run in (("one row after another", row_by_row), ("block by block", block_by_block)):
    times = relative_times(run, [x[:rows] for rows in ROWS])
    table.append([name, *(f"{seconds:.2f}" for seconds in times[1:])])
headings = [f"{rows} rows" for rows in ROWS[1:]]
print_table([f"{W.nbytes / 1e6:.0f} MB", *headings], table)

# %% [markdown]
# One row after another: each costs as much as the first, since it waits for the same numbers
# again. Block by block, only the first row waits for memory, which takes most of its time (tutorial
# 2). The others find the block in the cache. It is the same work in another order.

# %% [markdown]
# ## ... the whole model
#
# A pass of `stories`, whose weights stay in the cache of many processors, and one of the large
# model, after 100 tokens. minitx multiplies row by row or block by block, whichever is faster
# (minitx/fast.py). Compare each number with its number of rows.

# %%
title("A pass over several rows, the time of one row = 1")


def pass_times(model, repeats):
    text, state = stories[0][:100], model.new_state()
    model.hidden(text, state)

    def run(rows):
        model(text[:rows], state)  # which words they are does not matter for the time
        state.rewind(100)

    return relative_times(run, ROWS, repeats)


v_small, v_large = pass_times(target.model, 40), pass_times(large, 6)
table = []
for name, model, v in (("stories", target.model, v_small), ("288 x 6", large, v_large)):
    megabytes = sum(w.nbytes for w in weights(model).values()) / 1e6
    table.append([name, f"{megabytes:.0f} MB", *(f"{seconds:.2f}" for seconds in v[1:])])
print_table(["", "weights", *headings], table)
lines = {"stories": v_small, "288 x 6": v_large, "each row at full price": ROWS}
save_lines("11_rows", ROWS, lines, "rows in a pass", "time of the pass, one row = 1")

# %% [markdown]
# Every row after the first costs less than the first. In `stories`, a good part of the time is
# Python calling NumPy, once for all rows. (Its matrices go block by block from 5 rows on, so these
# may take no longer than 3.) In the large model it is memory. A GPU multiplies so much faster than
# its memory delivers that dozens of rows of a large model take no longer than one: the papers
# reckon with that.

# %% [markdown]
# ## 9. The price, in time
#
# Now all together. Call a step of the target model 1, a step of the draft model c, and a pass over
# the guesses and one row more v. With n guesses in a pass,
#
#     speedup = tokens per pass / (n c + v)
#
# By hand: 4 guesses that bring 4 tokens, with c = 1/4 and v = 1.5, give 4 / (1 + 1.5) = 1.6.
#
# We measure c for `stories`. For the large model we suppose a draft model that guesses as well, and
# is smaller by the same ratio; reading weights is nearly all of its time, so c is that ratio. In
# the last column, "v = 1", the rows of the check are free.

# %%
title("9. The price, in time")
ids = prompts[0]
steps = decode_last(target, ids), decode_last(draft, ids)
target_time, draft_time = time_side_by_side(*steps, repeats=60, own_time=True)
c_small, c_large = draft_time / target_time, sizes[1] / sizes[0]
print(f"a step of the draft model: c = {c_small:.2f} here, c = {c_large:.2f} by size")


def predicted(tokens, proposed, c, v):
    """The speedup by the formula; v: the time of a pass for each number of ROWS."""
    return tokens / (proposed * c + np.interp(proposed + 1, ROWS, v))


table = []
for name, (proposed, tokens, _) in costs.items():
    here = predicted(tokens, proposed, c_small, v_small)
    there = predicted(tokens, proposed, c_large, v_large)
    paper = tokens / (proposed * c_large + 1)
    table.append([name, *(f"{speed:.2f}" for speed in (here, there, paper))])
print_table(["speedup by the formula", "stories", "288 x 6", "v = 1"], table)

# %% [markdown]
# Eight guesses without a threshold bring most tokens per pass, but are fastest only where rows are
# free. A wasted guess costs a step of the draft model in all columns, and a row of the pass in the
# first two. A draft model with cheap steps helps, and a target model whose time goes into reading
# weights.

# %% [markdown]
# ## ... and measured
#
# Greedy, on one text of `stories`, with the default setting (gamma = 8, stop = 0.3). A run that
# writes only one token shows how long reading the prompt takes, so we can subtract that. Is the
# formula right?

# %%
by_default = minitx.load("stories", speculative=True)
with counting(by_default) as counts:
    new = by_default.generate(ids, 60)
assert new == target.generate(ids, 60)
passes = counts.events["target passes"]
proposed = counts.events["draft tokens proposed"] / passes
formula = predicted(len(new) / passes, proposed, c_small, v_small)

tasks = [partial(model.generate, ids, n) for model in (target, by_default) for n in (1, 60)]
times = time_side_by_side(*tasks, repeats=6, own_time=True)
alone_prompt, alone_all, guessing_prompt, guessing_all = times
after_prompt = (alone_all - alone_prompt) / (guessing_all - guessing_prompt)
print(f"by the formula for this text: {formula:.2f} times as fast")
print(f"measured, without reading the prompt: {after_prompt:.2f}")
print(f"measured, with it: {alone_all / guessing_all:.2f}")
say(
    "The formula leaves out what happens between the passes (computing the draft model's",
    "confidence, comparing guesses, taking rejected ones out of two KV caches), and that both",
    f"models read the prompt. The draft model has 1/{1 / c_large:.0f} of the target's weights, but",
    f"c = {c_small:.2f}: Python calls NumPy for each layer, however small it is.",
)

# %% [markdown]
# (c and v are the best of many short runs, which on a busy machine look better than a long run.)
#
# So speculative decoding pays most where models are large, and one text is written at a time. (In a
# large batch, a pass has so many rows already that more are not cheap.) minitx.lab.rows measures v
# for more shapes, and minitx.lab.speculation_speed the speedup.

# %% [markdown]
# ## Exercises
#
# Write it yourself: this exercise continues the tutorial, and a checker names your mistakes
# (`minitx learn start exercises` writes the files).
#
# - `minitx learn 16`: Speculative decoding
#
# Questions to think about, or to try in this file. The answers are computed in
# `tutorials/answers/11_guess_and_check.py`.
#
# 1. In section 1, let q be 1/10, 1/10, 1/10, 7/10: a draft model that nearly always says "cave".
#    How often is a guess accepted, and does p still come out? Then bring q close to p, all four
#    above 0. When is a guess always accepted?
# 2. With alpha = 0.92, c = 0.08 and v = 1, which gamma from 1 to 20 has the largest
#    tokens_per_pass(alpha, gamma) / (gamma * c + v)? And which from 1 to 8, if rows are not free:
#    c = 0.24 and v = 1 + 0.13 * gamma, about what section 9 measures for `stories`?
# 3. In section 7, put "draft": "self" beside "gamma": 8. The draft model is then the first half of
#    the target's own blocks. Is its alpha larger (section 4), and does a pass bring more tokens?
#    And the multiply-adds? (Tutorial 18 does this without running a block twice for a token.)
# 4. In section 8, set height to 40, 4,000 and 32,000 rows of W (all). How much memory does a block
#    take, and how often is NumPy called for five rows? Which heights are so small that the calls
#    take much of the time, and which blocks do not fit the L2 cache?
