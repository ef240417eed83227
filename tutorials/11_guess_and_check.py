"""Tutorial 11: guess and check. Can a small model's guesses save passes of the large model without
changing its text?

Tutorial 2 timed a pass of the model with 4 rows: it takes much less time than 4 passes with one
row. But the next token is needed before the one after it, so a single text gives one row at a time.
Unless somebody guesses the next tokens: then one pass of the large model checks them all. This is
speculative decoding. The small model is the draft model, the large one the target model.

Letters: V vocabulary; p the target model's distribution of the next token (V numbers), q the draft
model's; gamma guesses per pass.
"""

# %% Two models with one vocabulary
from fractions import Fraction

import numpy as np
from helpers import (
    QUESTION,
    STORY,
    bar,
    decode_last,
    held_out_stories,
    load_stories,
    print_table,
    save_lines,
    say,
    speedup,
    time_side_by_side,
    title,
)

import minitx
from minitx.decode import Sampler
from minitx.ledger import counting
from minitx.tree import weights

target = load_stories()
draft = minitx.load("stories-draft")
sizes = [sum(w.size for w in weights(lm.model).values()) for lm in (target, draft)]
print(f"target model: {sizes[0]:,} weights in {len(target.model.stack.blocks)} blocks")
print(f"draft model:  {sizes[1]:,} weights in {len(draft.model.stack.blocks)} blocks")

# %% 1. One guess, by hand
# Four words, and two opinions about which comes next. The draft model draws a word from q. The
# target model may keep it or throw it away, and the words that come out must be distributed as p:
# nobody may be able to tell that there was a draft model. All numbers are fractions, so nothing is
# rounded.
title("1. One guess, by hand")
WORDS = ("park", "kitchen", "garden", "cave")
p = [Fraction(6, 10), Fraction(3, 10), Fraction(1, 10), Fraction(0)]
q = [Fraction(4, 10), Fraction(2, 10), Fraction(2, 10), Fraction(2, 10)]

# The rule: accept the guess x with probability min(1, p(x) / q(x)). What p likes at least as much
# as q does is always accepted; "garden" is guessed twice as often as it should be, so every second
# one is rejected; "cave" must never come out.
accept = [min(Fraction(1), p_x / q_x) for p_x, q_x in zip(p, q)]

# After a rejection another word is drawn: from what p has more than q, scaled to sum 1. This is the
# residual distribution.
excess = [max(Fraction(0), p_x - q_x) for p_x, q_x in zip(p, q)]
residual = [e / sum(excess) for e in excess]
table = [[WORDS[i], *map(str, (p[i], q[i], accept[i], residual[i]))] for i in range(4)]
print_table(["word", "p", "q", "accept", "residual"], table)

# %% ... and all that can happen
# We go through every guess, accepted or not, and add up how often each word comes out.
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

# (To draw from p itself after a rejection would be wrong: "garden" would come too often. Its
# accepted guesses have used up all that it may have.)

# %% 2. Several guesses, one pass
# The draft model guesses gamma tokens in a row. One pass of the target model over all of them gives
# its own distribution after each. Guesses are accepted up to the first rejection; the rest is
# thrown away. A rejected guess is replaced by a draw from the residual distribution, so each pass
# brings at least one token. If all are accepted, the last row of the pass gives one token more, for
# free. If each guess is accepted with probability alpha, a pass brings
# 1 + alpha + alpha^2 + ... + alpha^gamma tokens on average.
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
# Many guesses pay only if nearly all are right: one wrong guess spoils those after it.

# %% 3. The same with the two models
# Greedy decoding first, where the rule is simple: a guess is accepted if it is the target model's
# own most likely token. To be short, this loop has no KV cache. Each line is one pass of the target
# model: accepted guesses, then the token of its own. Look at where the draft model goes wrong.
title("3. One story, pass by pass (greedy, gamma = 4)")


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

# %% 4. How often do the models agree?
# For sampling, what counts is alpha = the sum of min(p, q), as in the toy example. It needs no
# guessing: run both models over a text and compare their distributions at every token. The rows
# below are the question and what was generated, with the alpha that a guess had there. Where do the
# models agree?
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

stories = [target.encode(story.text) for story in held_out_stories(12)]
alpha = np.mean(np.concatenate([agreement(ids) for ids in stories]))
print(f"On average over {len(stories)} held-out stories: alpha = {alpha:.2f}")
# Grammar is easy to guess. The answers to questions are not: to find them the target model needs
# half of its 8 blocks, and the draft model has 2.

# %% 5. With the flag
# The technique `speculative` does the same with KV caches for both models, and samples by the rule
# of section 1. The ledger notes how many guesses were proposed and accepted. Look at tokens per
# pass: without guessing it is 1.
title("5. load('stories', speculative=...): counts on held-out stories")
GAMMA = 4
options = {"draft": "stories-draft", "gamma": GAMMA, "stop": 0.0}  # stop=0: always gamma guesses
guessing = minitx.load("stories", speculative=options)
prompts = [ids[:40] for ids in stories]


def write(lm, temperature):
    """Continue all prompts by 60 tokens; returns the number of new tokens, and the ledger."""
    tokens = 0
    with counting(lm) as counts:
        for seed, ids in enumerate(prompts):
            tokens += len(lm.generate(ids, 60, temperature=temperature, seed=seed))
    return tokens, counts


table = []
for name, temperature in (("greedy", 0), ("temperature 1", 1)):
    tokens, counts = write(guessing, temperature)
    tokens_alone, alone = write(target, temperature)
    proposed = counts.events["draft tokens proposed"]
    accepted = counts.events["draft tokens accepted"]
    passes = tokens - accepted  # each pass adds one token of the target model's own
    assert passes < tokens
    work, work_alone = counts.total().multiply_adds, alone.total().multiply_adds
    relative_work = (work / tokens) / (work_alone / tokens_alone)
    table.append([name, proposed, accepted, f"{tokens / passes:.2f}", f"{relative_work:.2f}"])
print_table(["", "proposed", "accepted", "tokens per pass", "multiply-adds (alone = 1)"], table)
expected = tokens_per_pass(alpha, GAMMA)
print(f"By the formula for alpha = {alpha:.2f}: {expected:.2f} tokens per pass")
# The formula is for sampling, and a good guide though alpha differs from token to token. Greedy
# decoding accepts less: where two words are about equally likely, the models' distributions may
# nearly agree and yet have different most likely words. The multiply-adds are the first part of the
# price: more than without guessing, since rejected guesses were work for nothing, in both models.

# %% 6. Is sampled text still distributed as p?
# A check from outside: after one beginning, draw the next word 250 times, with a guess each time,
# and count. Here the draft model is far off: it nearly forgets Max. A share of 250 draws has a
# standard error of sqrt(p (1 - p) / 250).
title("6. The next word, drawn 250 times with guess and check")
DRAWS = 250
beginning = target.encode(STORY + " Max was in the cave. Then")
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
# What is drawn follows p, not q: exact, although the guesses come from q.

# %% 7. The price, in time
# A pass brings several tokens, but it takes gamma steps of the draft model and a pass of gamma + 1
# rows. Call one step of the target model 1, a step of the draft model c, and the pass v. Then the
# speedup is tokens per pass / (gamma c + v). First c and v:
title("7. The price, in time")
ids = prompts[0]
state = target.model.new_state()
target.model.next_logits(ids, state)


def checking_pass():
    target.model(ids[: GAMMA + 1], state)  # gamma + 1 rows after the prompt
    state.rewind(len(ids))


steps = decode_last(target, ids), decode_last(draft, ids), checking_pass
target_time, draft_time, pass_time = time_side_by_side(*steps, repeats=60)
c, v = draft_time / target_time, pass_time / target_time
print(f"a step of the draft model: c = {c:.2f}; a pass of {GAMMA + 1} rows: v = {v:.2f}")


# %% ... and the speedup
# Greedy, on one text. In a large model both c and v are better: there, time is reading weights from
# memory (tutorial 2), so v is nearly 1, and c is the ratio of the two sizes. The last line is what
# our tokens per pass would be worth there.
def write_alone():
    return target.generate(ids, 60)


def write_guessing():
    return guessing.generate(ids, 60)


with counting(guessing) as counts:
    tokens = len(write_guessing())
assert write_guessing() == write_alone()
brought = tokens / (tokens - counts.events["draft tokens accepted"])
gain = speedup(write_alone, write_guessing, repeats=6)
print(f"{brought:.2f} tokens per pass")
print(f"by the formula: {brought / (GAMMA * c + v):.2f} times as fast")
print(f"measured: {gain:.2f} times as fast")
ratio = sizes[1] / sizes[0]
print(f"if reading weights were all: {brought / (GAMMA * ratio + 1):.2f} times as fast")
say(
    "Here little is gained. The formula leaves out what happens once per text (both models read",
    "the prompt) and between the passes (comparing guesses, taking rejected ones out of two KV",
    f"caches). The draft model has 1/{1 / ratio:.0f} of the target's weights, but its step takes",
    f"{c:.0%} of the target's time: Python calls NumPy for each layer, however small it is.",
)

# %% Try this
# 1. In section 1, let q be 1/10, 1/10, 1/10, 7/10: a draft model that nearly always says "cave".
#    How often is a guess accepted, and does p still come out? Then bring q close to p, all four
#    above 0. When is a guess always accepted?
# 2. With alpha = 0.91, c = 0.08 and v = 1, which gamma from 1 to 20 has the largest
#    tokens_per_pass(alpha, gamma) / (gamma * c + v)? And with your c and v from section 7?
# 3. Guess without a second model: speculative={"draft": "self"} (the first half of the target's own
#    blocks) or the technique prompt_lookup={} (what followed the same words earlier in the text).
#    Compare tokens per pass in section 5. Which of the two needs no multiply-adds for its guesses?
#    (alpha, c and the text of section 7 still describe stories-draft, whatever you set here.)
