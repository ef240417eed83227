"""``python -m minitx.lab.semantic_hits``: hits and false hits of the semantic cache on stories.

Requests are graded questions about stories: the prompt ends before the answer, one word, which the
model is to write. Each question is followed by prompts that differ from it in one word of the
story: another name, place, thing or mood, say. Some of these words matter for the answer and others
do not. Then follows the same question about another person or thing of the story. The model answers
every request, so that for each threshold all hits can be checked.

    hit rate            requests that get a stored answer
    P(wrong | hit)      hits whose stored answer is not the model's, with a 95 % upper bound
    wrong answers       hit rate x P(wrong | hit): of all requests

Then each question and those that follow it, as pairs, by several embeddings: how well does a
threshold tell pairs with the same answer from pairs with another one? (AUC: the probability that a
random one of the former is more similar than a random one of the latter; 0.5: not at all.)
"""

import argparse
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import minitx
from minitx import progress
from minitx.arguments import count
from minitx.exit_status import run_module
from minitx.lab.layout import table
from minitx.lab.learn_then_test import binomial_tail
from minitx.skip.semantic_cache import SemanticStore, embedding, unit_mean
from minitx.training.stories import Story, first_stories
from minitx.training.stories.grammar import BOXES, FILLERS, NAMES, THINGS

THRESHOLDS = (-1.0, 0.9, 0.99, 0.999, 0.9995, 0.9999, 1.0, 1.01)
CONFIDENCE = 0.95


# The bound ---------------------------------------------------------------------------------------


def upper_bound(wrong: int, n: int, confidence: float = CONFIDENCE) -> float:
    """The largest probability that is compatible with so many wrong ones among n, at this
    confidence (Clopper and Pearson, 1934): the p with P[Bin(n, p) <= wrong] = 1 - confidence.
    Without any wrong one that is 1 - (1 - confidence)^(1/n)."""
    if wrong >= n:
        return 1.0
    low, high = 0.0, 1.0
    while high - low > 1e-12:
        p = (low + high) / 2
        low, high = (p, high) if binomial_tail(wrong, n, p) > 1 - confidence else (low, p)
    return high


# Requests ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A request and what the model answers."""

    ids: list[int]
    answer: int
    embeddings: dict[str, np.ndarray]  # by name, at length 1


def requests(lm, number: int, changes: int, grade="full", seed: int = 0) -> list[list[list[int]]]:
    """Questions about stories, each followed by ``changes`` prompts that differ from it in one word
    and by the same question about something else."""
    draw = random.Random(seed).random
    found = []
    for story in first_stories("evaluation", grade, 0, number):
        for text in questions(story):
            texts = [text, *(change_a_word(text, draw) for _ in range(changes))]
            texts += ask_about_another(text, draw)
            found.append([lm.encode(text) for text in texts])
    return found


def questions(story: Story) -> list[str]:
    """The story up to the answer of each of its questions."""
    ends = [answer.piece_index for answer in story.answers if answer.kind != "mention"]
    return ["".join(piece[0] for piece in story.pieces[:end]) for end in ends]


def change_a_word(text: str, draw) -> str:
    """The text with one word of the story replaced by another of its kind: a name, a mood, say."""
    story, question = story_and_question(text)
    words = story.split(" ")
    places = [i for i, word in enumerate(words) if word.rstrip(".,?") in KINDS]
    i = places[int(draw() * len(places))]
    word = words[i].rstrip(".,?")
    others = [other for other in KINDS[word] if other != word]
    words[i] = others[int(draw() * len(others))] + words[i][len(word) :]
    return " ".join(words) + question


def ask_about_another(text: str, draw) -> list[str]:
    """The same question about another person or thing of the story; [] if there is none."""
    story, question = story_and_question(text)
    asked = [word for word in re.findall(r"\w+", question) if word in ENTITIES]
    there = [word for word in dict.fromkeys(re.findall(r"\w+", story)) if word in ENTITIES]
    others = [word for word in there if word not in asked and ENTITIES[word] == ENTITIES[asked[0]]]
    if not others:
        return []
    return [story + question.replace(asked[0], others[int(draw() * len(others))])]


def story_and_question(text: str) -> tuple[str, str]:
    end = text.rindex(".", 0, text.rindex("?")) + 1
    return text[:end], text[end:]


KINDS = {word: words for words in reversed(FILLERS.values()) for word in words}
ENTITIES = {word: "name" for word in NAMES} | {word: "thing" for word in THINGS + BOXES}


def ask(lm, ids: list[int]) -> Asked:
    """The model's answer, and embeddings of the prompt: the one of the technique; counts of words;
    and, as a yardstick, the state of the last token, which takes the whole pass over the prompt."""
    state = lm.model.hidden(np.array(ids))[-1:]  # (1, D)
    answer = int(lm.model.head(lm.model.norm(state)).argmax())
    counts = np.bincount(ids, minlength=lm.model.config.vocab_size).astype(float)
    found = embedding(lm.model, ids), unit_mean(counts[None]), unit_mean(state)
    return Asked(ids, answer, dict(zip(EMBEDDINGS, found)))


EMBEDDINGS = ("mean of token embeddings", "counts of words", "last state (a whole pass)")


# Hits --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What happens at one threshold."""

    threshold: float
    requests: int
    hits: int
    wrong: int  # hits
    by_chance: int  # hits that a random stored answer would get wrong

    @property
    def hit_rate(self) -> float:
        return self.hits / self.requests

    @property
    def false_hits(self) -> float:
        """P(wrong | hit)"""
        return self.wrong / max(self.hits, 1)

    @property
    def wrong_answers(self) -> float:
        """Of all requests."""
        return self.hit_rate * self.false_hits


def served(asked: Sequence[Asked], threshold: float, entries: int, name: str, seed=0) -> Row:
    """The requests in their order, served by the store of the technique; no hit is audited."""
    store, draw = SemanticStore(entries), random.Random(seed).random
    hits = wrong = by_chance = 0
    for one in asked:
        e = one.embeddings[name]
        number, similarity = store.nearest(e, b"")
        if similarity < threshold:
            store.put(e, b"", [one.answer])
            continue
        some = list(store.answers.values())
        hits += 1
        by_chance += some[int(draw() * len(some))].ids != [one.answer]
        wrong += store.use(number).ids != [one.answer]
    return Row(threshold, len(asked), hits, wrong, by_chance)


def auc(same: np.ndarray, different: np.ndarray) -> float:
    """The probability that a random one of ``same`` is larger than a random one of ``different``,
    ties counted half."""
    larger = same[:, None] > different
    return float((larger + 0.5 * (same[:, None] == different)).mean())


def wrong_in_nearer_half(same: np.ndarray, different: np.ndarray) -> float:
    """Of the more similar half of all pairs, the share that has another answer: the false hits at a
    hit rate of one half."""
    middle = np.median(np.concatenate((same, different)))
    near = (same > middle).sum(), (different > middle).sum()
    return float(near[1] / max(sum(near), 1))


# Report ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    name: str
    rows: list[Row]
    pairs: dict[str, tuple[np.ndarray, np.ndarray]]  # similarities: same answer, another answer

    def __str__(self) -> str:
        head = ["threshold", "hit rate", "hits", "wrong", "P(wrong | hit)", "95 % bound"]
        lines = [[*head, "wrong answers", "random entry"]]
        for r in self.rows:
            rates = [f"{100 * r.false_hits:.1f} %", f"{100 * upper_bound(r.wrong, r.hits):.2f} %"]
            chance = f"{100 * r.by_chance / max(r.hits, 1):.0f} % wrong"
            lines.append(
                [f"{r.threshold:g}", f"{100 * r.hit_rate:.1f} %", f"{r.hits:,}", f"{r.wrong:,}"]
                + ([*rates, f"{100 * r.wrong_answers:.1f} %", chance] if r.hits else [""] * 4)
            )
        same, other = next(iter(self.pairs.values()))
        words = [["embedding", "same answer", "another answer", "AUC", "nearer half"]]
        for name, (a, b) in self.pairs.items():
            both = [""] * 2  # they compare pairs of both kinds
            if len(a) and len(b):
                wrong = f"{100 * wrong_in_nearer_half(a, b):.1f} % wrong"
                both = [f"{auc(a, b):.2f}", wrong]
            words.append([name, spread(a), spread(b), *both])
        return "\n".join(
            [
                f"semantic_cache on {self.name}: {self.rows[0].requests:,} questions about "
                "stories, each answered with one word.",
                "",
                table(lines),
                "",
                f"{len(same) + len(other):,} pairs of prompts that differ in a word: {len(same):,} "
                f"have the same answer, {len(other):,} another one.",
                "Cosine similarity of the prompts, median (lowest to highest):",
                "",
                table(words),
            ]
        )


def spread(x: np.ndarray) -> str:
    if not len(x):
        return "no pair"
    return f"{np.median(x):.4f} ({x.min():.4f} to {x.max():.4f})"


def measure(lm, stories: int, changes: int, thresholds, entries=1000, bar=True) -> Report:
    groups, asked = requests(lm, stories, changes), []
    for group in progress.bar(groups, "questions", unit="question", shown=bar):
        asked.append([ask(lm, ids) for ids in group])
    flat = [one for group in asked for one in group]
    rows = [served(flat, threshold, entries, EMBEDDINGS[0]) for threshold in thresholds]
    return Report(lm.name, rows, {name: split(asked, name) for name in EMBEDDINGS})


def split(asked, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The similarities of the pairs with the same answer, and of those with another one."""
    found: tuple[list, list] = [], []
    for first, *others in asked:
        for one in others:
            similarity = float(first.embeddings[name] @ one.embeddings[name])
            found[one.answer != first.answer].append(similarity)
    return np.array(found[0]), np.array(found[1])


def main() -> None:
    about = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m minitx.lab.semantic_hits", description=about)
    parser.add_argument("-m", "--model", default="stories", metavar="NAME", help="model")
    parser.add_argument("--stories", type=count, default=60, metavar="N", help="stories")
    changes = "prompts with one word changed, after each question"
    parser.add_argument("--changes", type=count, default=2, metavar="N", help=changes)
    thresholds = "thresholds to try"
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS, help=thresholds)
    parser.add_argument("--entries", type=count, default=1000, metavar="N", help="store's size")
    args = parser.parse_args()

    def run() -> None:
        lm = minitx.load(args.model)
        print(measure(lm, args.stories, args.changes, args.thresholds, args.entries))

    run_module(parser, run)


if __name__ == "__main__":
    main()
