"""How hard a story is: a ``Grade`` holds what the story generator may do, and how often.

Grades are plain data (numbers and dicts), so that a ``recipe.json`` can hold them. A kind of
sentence or question that has weight 0, or is left out, never happens.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches

from minitx.errors import MinitxError

# What a sentence can do. "mention" holds an answer; "scene" and "chat" only distract.
SENTENCE_KINDS = (
    "meet", "arrive", "move", "see", "find", "give", "spot", "carry", "fill", "put", "take",
    "leave", "fetch", "own", "change", "mention", "scene", "chat",
)  # fmt: skip
# How many facts an answer needs to chain. A count is a sum over facts and stands by itself (0).
# "inside" (in which box?) is asked by drills alone: no grade below has it.
HOPS = {
    "mention": 1, "where1": 1, "colour": 1, "who": 1,
    "where2": 2, "colour2": 2, "who2": 2, "where3": 3, "count": 0, "inside": 1,
}  # fmt: skip
KINDS = tuple(HOPS)
# Kinds of question that can be answered shortly.
SHORT = ("colour", "colour2", "who", "who2", "where1", "where2", "where3")
QUESTION_KINDS = tuple(kind for kind in KINDS if kind != "mention")


@dataclass(frozen=True)
class Grade:
    """Weights and limits of one grade of difficulty. Lengths are in words (about 1.2 tokens each).

    Before each sentence, one kind of sentence or question is drawn by weight among those that the
    facts allow: there is no box to put things in before there is a box.
    """

    sentences: dict = field(default_factory=dict)  # kind of sentence -> weight
    questions: dict = field(default_factory=dict)  # kind of question -> weight, on the same scale
    wordings: int = 9  # that a kind of sentence has at most: 1 puts everything in the same words
    phrases: bool = True  # open and close with set phrases, else with the shortest ones
    min_people: int = 2  # no question before that many people are known
    max_people: int = 4
    max_things: int = 8
    max_boxes: int = 3
    min_words: int = 0  # no end before that
    max_words: int = 250  # the end comes before that
    min_questions: int = 0  # no end before that, unless nothing is left to tell
    max_questions: int = 99  # the end comes right after that
    stop: float = 0.1  # chance of the end before each sentence, where it may come
    value_first: bool = False  # tell values before their keys where there is such a wording
    shortly: tuple = ()  # kinds of question that have short answers: see words.py
    recap: str = ""  # before the end, tell all news again: in the "same" order, or "mixed"

    def __post_init__(self):
        for name, known in (("sentences", SENTENCE_KINDS), ("questions", QUESTION_KINDS)):
            _check_weights(name, getattr(self, name), known)
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type in (int, "int") and (type(value) is not int or value < 0):
                raise MinitxError(
                    f"Grade field {entry.name!r} is {value!r}; it must be an integer >= 0."
                )
        for name in ("phrases", "value_first"):
            if type(getattr(self, name)) is not bool:
                raise MinitxError(
                    f"Grade field {name!r} is {getattr(self, name)!r}; it must be true or false."
                )
        if type(self.shortly) not in (list, tuple) or any(k not in SHORT for k in self.shortly):
            raise MinitxError(
                f"Grade field 'shortly' is {self.shortly!r}; it must be a list of some of "
                f"{', '.join(SHORT)}."
            )
        object.__setattr__(self, "shortly", tuple(self.shortly))  # JSON has lists only
        if type(self.stop) not in (int, float) or not 0 < self.stop < 1:
            raise MinitxError(
                f"Grade field 'stop' is {self.stop!r}; it must be a chance between 0 and 1."
            )
        _check_recap(self)
        if self.wordings < 1:
            raise MinitxError("Grade has wordings 0; a sentence needs at least 1.")
        if not 1 <= self.max_people <= 20 or self.max_things > 30 or self.max_boxes > 8:
            raise MinitxError(
                "A grade may have 1 to 20 people, at most 30 things and at most 8 boxes."
            )
        if self.min_people > self.max_people:
            raise MinitxError(
                f"Grade has min_people {self.min_people}; it must be at most max_people, "
                f"which is {self.max_people}."
            )
        if self.max_words < self.min_words + ROOM:
            raise MinitxError(
                f"Grade has max_words {self.max_words}; it must be at least min_words + {ROOM}, "
                f"which is {self.min_words + ROOM}, to leave room for the last sentence."
            )


# The longest sentence (16 words) and the longest closing (7), or the longest of those that a recap
# tells again (11) twice and the short closing (2).
ROOM = 25
RETOLD = ("arrive", "see", "find", "own")  # kinds of sentences that a recap tells again


def _check_recap(grade: Grade) -> None:
    """A recap has something to tell, and what it tells is still so."""
    if grade.recap not in ("", "same", "mixed"):
        raise MinitxError(
            f"Grade field 'recap' is {grade.recap!r}; it must be 'same', 'mixed' or empty."
        )
    if not grade.recap:
        return
    told = {kind for kind, weight in grade.sentences.items() if weight > 0}
    for kind in ("move", "fetch", "change"):
        if kind in told:
            raise MinitxError(
                f"Grade has a recap and sentences of kind {kind!r}, after which what the recap "
                "tells again is no longer so; leave out one of the two."
            )
    if grade.phrases and not told.intersection(RETOLD):
        raise MinitxError(
            f"Grade has a recap but nothing to tell again; give {', '.join(RETOLD)} a weight "
            "above 0."
        )


def _check_weights(name: str, weights, known: tuple[str, ...]) -> None:
    if not isinstance(weights, dict):
        raise MinitxError(
            f"Grade field {name!r} is {weights!r}; it must be an object of kind: weight."
        )
    for kind, weight in weights.items():
        if kind not in known:
            raise MinitxError(
                f"Grade field {name!r} has the unknown kind {kind!r}; known: {', '.join(known)}."
            )
        if type(weight) not in (int, float) or not 0 <= weight < math.inf:
            raise MinitxError(
                f"Grade weight {name}[{kind!r}] is {weight!r}; it must be a number >= 0."
            )


def grade_from(source) -> Grade:
    """The grade that ``source`` means: a ``Grade``, a name in ``GRADES``, or a dict of fields.

    A dict may name the grade that it changes, ``{"from": "full", "max_people": 3}``; its fields
    replace whole fields of that grade. Raises ``MinitxError`` for unknown names and fields.
    """
    if isinstance(source, Grade):
        return source
    if isinstance(source, str):
        if source not in GRADES:
            near = get_close_matches(source, GRADES, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise MinitxError(f"Unknown grade {source!r}; known: {', '.join(GRADES)}.{hint}")
        return GRADES[source]
    if not isinstance(source, dict):
        raise MinitxError(f"A grade is a name or an object of fields, not {source!r}.")
    changes = dict(source)
    base = asdict(grade_from(changes.pop("from"))) if "from" in changes else {}
    known = [entry.name for entry in fields(Grade)]
    for name in changes:
        if name not in known:
            raise MinitxError(f"Unknown grade field {name!r}; known: from, {', '.join(known)}.")
    return Grade(**(base | changes))


# In rising difficulty. The weights were searched for, so that hops come in useful shares and the
# value named last is seldom the answer (a question is likeliest right after its last fact).
GRADES = {
    "set_phrases": Grade(
        sentences={"meet": 1, "scene": 3, "chat": 3},
        min_people=1, max_people=3, min_words=20, max_words=80, stop=0.2,
    ),
    "told_twice": Grade(
        sentences={"arrive": 3, "see": 2, "find": 1, "own": 1}, recap="mixed",
        phrases=False, max_people=4, max_things=4, max_words=90, stop=0.2,
    ),
    "one_hop_tiny": Grade(
        sentences={"arrive": 2}, questions={"where1": 3},
        phrases=False, max_people=4, max_words=60, min_questions=1, max_questions=2, stop=0.5,
    ),
    "one_hop": Grade(
        sentences={
            "meet": 0.5, "arrive": 8, "move": 2, "find": 4, "give": 3, "scene": 0.5, "chat": 1,
            "mention": 10,
        },
        questions={"where1": 4, "colour": 30, "who": 4},
        min_people=3, max_things=4, min_words=35, max_words=105, min_questions=2, stop=0.3,
    ),
    "two_hops": Grade(
        sentences={
            "meet": 0.5, "arrive": 25, "move": 4, "find": 3.5, "give": 2, "spot": 1, "carry": 4,
            "fill": 6, "put": 1.5, "take": 1, "leave": 0.5, "fetch": 0.7, "scene": 0.5, "chat": 1,
            "mention": 12,
        },
        questions={
            "where1": 2.5, "colour": 10, "who": 2, "where2": 14, "colour2": 35, "who2": 50,
        },
        max_things=5, max_boxes=2, min_words=50, max_words=130, min_questions=2, stop=0.15,
    ),
    "three_hops": Grade(
        sentences={
            "meet": 0.3, "arrive": 8, "move": 4, "find": 1.5, "give": 1, "carry": 9, "fill": 9,
            "put": 1.5, "take": 0.5, "leave": 0.4, "fetch": 1, "scene": 0.5, "chat": 1,
            "mention": 12,
        },
        questions={
            "where1": 1.5, "colour": 2, "who": 0.5, "where2": 2, "colour2": 6, "who2": 2,
            "where3": 100,
        },
        max_things=6, min_words=60, max_words=160, min_questions=2, stop=0.15,
    ),
    "full": Grade(
        sentences={
            "meet": 0.5, "arrive": 10, "move": 6, "find": 2.5, "give": 1.2, "spot": 0.5,
            "carry": 12, "fill": 10, "put": 2, "take": 0.7, "leave": 0.4, "fetch": 1, "own": 4,
            "change": 10, "scene": 0.5, "chat": 1.5, "mention": 20,
        },
        questions={
            "where1": 2, "colour": 6, "who": 1.5, "where2": 4, "colour2": 24, "who2": 7,
            "where3": 250, "count": 160,
        },
        min_people=3, max_people=5, max_boxes=4, min_words=60, max_words=210, min_questions=1,
        stop=0.06,
    ),
}  # fmt: skip
