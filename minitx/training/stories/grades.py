"""Grades of difficulty: which sentences and questions a story may contain, and how often.

A ``Grade`` is plain data (numbers and dicts), so it can be part of a ``recipe.json``. A kind of
sentence or question that has weight 0, or is missing, never occurs.
"""

from dataclasses import asdict, dataclass, field, fields

from minitx.errors import MinitxError, abbreviate, one_of

# Kinds of sentences. "mention" contains an answer; "scene" and "chat" are distractors.
SENTENCE_KINDS = (
    "meet", "arrive", "move", "see", "find", "give", "spot", "carry", "fill", "put", "take",
    "leave", "fetch", "own", "change", "mention", "scene", "chat",
)  # fmt: skip
# The number of hops: facts that must be chained for an answer. A count is a sum over facts and has
# 0. No grade below asks "inside" (in which box?); recipes may.
HOPS = {
    "mention": 1, "where1": 1, "colour": 1, "who": 1,
    "where2": 2, "colour2": 2, "who2": 2, "where3": 3, "count": 0, "inside": 1,
}  # fmt: skip
KINDS = tuple(HOPS)
# Kinds of questions that have a short form of the answer.
SHORT = ("colour", "colour2", "who", "who2", "where1", "where2", "where3")
QUESTION_KINDS = tuple(kind for kind in KINDS if kind != "mention")


@dataclass(frozen=True)
class Grade:
    """Sampling weights and limits. Lengths are in words (about 1.2 tokens each).

    The kind of each sentence is sampled by weight, among the sentences and questions that the facts
    so far allow: a thing cannot be put into a box before there is a box.
    """

    sentences: dict = field(default_factory=dict)  # kind of sentence -> weight
    questions: dict = field(default_factory=dict)  # kind of question -> weight, on the same scale
    wordings: int = 9  # most templates used per kind of sentence; 1: no variation
    phrases: bool = True  # varied opening and closing sentences; false: the shortest ones
    min_people: int = 2  # questions start once the story has this many people
    max_people: int = 4
    max_things: int = 8
    max_boxes: int = 3
    min_words: int = 0  # the story ends no earlier, unless no sentence is possible
    max_words: int = 250  # the story has at most this many words
    min_questions: int = 0  # like min_words, in questions
    max_questions: int = 99  # the story ends right after this many
    stop: float = 0.1  # probability of ending before each sentence, where it may end
    value_first: bool = False  # values before their keys, where there is such a template
    shortly: tuple = ()  # kinds of questions answered in the short form: see grammar.py
    recap: str = ""  # before the end, repeat all facts: in the "same" order, or "mixed"

    def __post_init__(self):
        for name, known in (("sentences", SENTENCE_KINDS), ("questions", QUESTION_KINDS)):
            _check_weights(name, getattr(self, name), known)
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type in (int, "int") and (type(value) is not int or not 0 <= value <= 10**4):
                raise MinitxError(
                    f"Grade field {entry.name!r} must be an integer >= 0 (at most 10000), got "
                    f"{abbreviate(value)}."
                )
        for name in ("phrases", "value_first"):
            if type(getattr(self, name)) is not bool:
                raise MinitxError(
                    f"Grade field {name!r} must be true or false, got "
                    f"{abbreviate(getattr(self, name))}."
                )
        if type(self.shortly) not in (list, tuple) or any(k not in SHORT for k in self.shortly):
            raise MinitxError(
                f"Grade field 'shortly' must be a list of kinds among {', '.join(SHORT)}, got "
                f"{abbreviate(self.shortly)}."
            )
        object.__setattr__(self, "shortly", tuple(self.shortly))  # JSON has no tuples
        if type(self.stop) not in (int, float) or not 0 < self.stop < 1:
            raise MinitxError(
                "Grade field 'stop' must be a probability between 0 and 1, got "
                f"{abbreviate(self.stop)}."
            )
        _check_recap(self)
        if self.wordings < 1:
            raise MinitxError("Grade field 'wordings' must be at least 1, got 0.")
        if not 1 <= self.max_people <= 20 or self.max_things > 30 or self.max_boxes > 8:
            raise MinitxError(
                "A grade must have max_people from 1 to 20, max_things up to 30 and max_boxes up "
                f"to 8; got {self.max_people}, {self.max_things} and {self.max_boxes}."
            )
        if self.min_people > self.max_people:
            raise MinitxError(
                f"Grade field 'min_people' must be at most max_people, which is {self.max_people}; "
                f"got {self.min_people}."
            )
        if self.max_words < self.min_words + ROOM:
            raise MinitxError(
                f"Grade field 'max_words' must be at least min_words + {ROOM} (room for the last "
                f"sentence), which is {self.min_words + ROOM}; got {self.max_words}."
            )


# The longest sentence (16 words) and the longest closing (7); or twice the longest sentence that a
# recap repeats (11) and the short closing (2).
ROOM = 25
RECAP_KINDS = ("arrive", "see", "find", "own")  # kinds of sentences that a recap repeats


def _check_recap(grade: Grade) -> None:
    """Refuse a recap that has nothing to repeat, or that could repeat outdated facts."""
    if grade.recap not in ("", "same", "mixed"):
        raise MinitxError(
            f"Grade field 'recap' must be 'same', 'mixed' or empty, got {grade.recap!r}."
        )
    if not grade.recap:
        return
    used = {kind for kind, weight in grade.sentences.items() if weight > 0}
    for kind in ("move", "fetch", "change"):
        if kind in used:
            raise MinitxError(
                f"Grade has a recap and sentences of kind {kind!r}, which change the facts that "
                "the recap repeats; use one of the two."
            )
    if grade.phrases and not used.intersection(RECAP_KINDS):
        raise MinitxError(
            f"Grade has a recap but no facts to repeat; give {', '.join(RECAP_KINDS)} a weight "
            "above 0."
        )


def _check_weights(name: str, weights, known: tuple[str, ...]) -> None:
    if not isinstance(weights, dict):
        raise MinitxError(
            f"Grade field {name!r} must be an object {{kind: weight}}, got {abbreviate(weights)}."
        )
    for kind, weight in weights.items():
        if kind not in known:
            raise MinitxError(
                f"Grade field {name!r} has the unknown kind {abbreviate(kind)}; expected one of "
                f"{', '.join(known)}."
            )
        if type(weight) not in (int, float) or not 0 <= weight <= 1e9:
            raise MinitxError(
                f"Grade weight {name}[{kind!r}] must be a number >= 0 (at most 1e9), got "
                f"{abbreviate(weight)}."
            )


def grade_from(source) -> Grade:
    """The grade given as a ``Grade``, a name in ``GRADES``, or a dict of fields.

    A dict may be based on another grade, ``{"from": "full", "max_people": 3}``; each of its fields
    replaces that field as a whole. Raises ``MinitxError`` for unknown names and fields.
    """
    if isinstance(source, Grade):
        return source
    if isinstance(source, str):
        if source not in GRADES:
            raise MinitxError(f"Unknown grade {abbreviate(source)}; {one_of(source, GRADES)}")
        return GRADES[source]
    if not isinstance(source, dict):
        raise MinitxError(
            f"A grade must be a name or an object of fields, got {abbreviate(source)}."
        )
    changes = dict(source)
    base = asdict(grade_from(changes.pop("from"))) if "from" in changes else {}
    known = [entry.name for entry in fields(Grade)]
    for name in changes:
        if name not in known:
            raise MinitxError(
                f"Unknown grade field {abbreviate(name)}; expected from, {', '.join(known)}."
            )
    return Grade(**(base | changes))


# In order of difficulty. The weights were tuned so that each number of hops is frequent enough and
# the last value named is seldom the answer (a question is most likely right after its last fact).
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
