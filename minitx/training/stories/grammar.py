"""The vocabulary of the stories and their sentence templates; nothing is sampled here.

A template is a sentence with slots: ``" {who} went to the {place}."``. Slots that are listed as the
template's *facts* are filled by the story: they change the world or ask about it. All other slots
are filler and take random words from ``FREE``. A bar ``|`` marks the answer word. Every template of
a kind of sentence contains all facts of that kind, and no two templates can produce the same text:
so the text determines every choice.

Every word but the first of a story has a leading space, as in GPT-2's pre-tokenizer.
"""

import re
from typing import NamedTuple

GIRLS = tuple("Eva Lily Anna Mia Nora Zoe Ruth Clara Ivy Lucy Rosa Emma".split())
BOYS = tuple("Tom Sam Ben Max Leo Jack Finn Hugo Paul Oscar Noah Adam".split())
NAMES = GIRLS + BOYS
PLACES = tuple(
    "park barn school garden forest kitchen market library field cave "
    "castle village museum bakery stable harbour meadow cellar attic valley".split()
)
THINGS = tuple(
    "kite ball bell book drum lamp ring coin key doll hat scarf spoon cup plate map flute rope "
    "brush comb candle mirror button feather pencil ribbon shell stone whistle marble blanket "
    "teapot".split()
)
BOXES = tuple("box basket bag chest bucket jar sack crate".split())  # the containers
COLOURS = tuple("red blue green yellow white black brown pink purple grey".split())
NUMBERS = tuple("zero one two three four five six seven eight nine".split())
FOODS = tuple("apple pear plum nut cookie carrot egg bun lemon grape".split())  # plural: + s

ANIMALS = tuple("dog cat bird horse rabbit duck frog mouse goat hen pony puppy".split())
ADVERBS = tuple(
    "slowly quickly quietly happily carefully gladly bravely calmly proudly sadly".split()
)
MOODS = tuple("happy sad tired hungry bored excited sleepy lonely curious thirsty".split())
TRAITS = tuple("kind brave clever funny quiet tall polite cheerful".split())
SIZES = tuple("big small new tiny shiny little heavy pretty".split())
MEALS = tuple("breakfast lunch dinner".split())
DEEDS = tuple("laughed smiled sang danced yawned waved whistled hummed clapped giggled".split())
NOISES = tuple("barked hissed jumped stared ran growled".split())
PLAYS = tuple("play read paint swim climb sleep dance draw".split())
WEATHER = tuple("sunny rainy cold windy warm cloudy foggy snowy".split())
PLANTS = tuple("tree bush rose hedge fern".split())

# Filler slots and their words. Places and colours are filler in sentences that state no fact ("Tom
# dreamed about the cave"): distractors for a model that answers with the latest place.
FREE = {
    "animal": ANIMALS, "beast": ANIMALS, "adverb": ADVERBS, "mood": MOODS, "trait": TRAITS,
    "size": SIZES, "meal": MEALS, "did": DEEDS, "noise": NOISES, "play": PLAYS,
    "weather": WEATHER, "plant": PLANTS, "place": PLACES, "colour": COLOURS,
}  # fmt: skip
# Words that depend on a person's name.
GRAMMAR = {name: {"he": "she", "his": "her", "boy": "girl"} for name in GIRLS}
GRAMMAR |= {name: {"he": "he", "his": "his", "boy": "boy"} for name in BOYS}
# Slots whose value can be an answer, and the type of that value.
TYPES = {
    "who": "name", "other": "name", "box": "box", "object": "box",
    "place": "place", "colour": "colour", "number": "number",
}  # fmt: skip
FILLERS = FREE | {
    "who": NAMES,
    "other": NAMES,
    "thing": THINGS,
    "object": THINGS + BOXES,
    "box": BOXES,
    "number": NUMBERS,
    "foods": tuple(food + "s" for food in FOODS),
    "food": FOODS + tuple(food + "s" for food in FOODS),
    "he": ("he", "she"),
    "his": ("his", "her"),
    "boy": ("boy", "girl"),
}

# The key of a fact comes before its value (first the bag, then who has it), and in answers a few
# words separate the two. Then a model learns within minutes of training to look up a value by its
# key. With the value first, or with the answer right after the key, it did not. Grades can ask for
# those, too ("value first", "shortly"). kind of sentence: (facts, templates). For "mention" and
# "ask" the fact is the entity asked about.
TEMPLATES = {
    "open": (
        "who",
        (
            "Once upon a time there was a {boy} named {who}.",
            "Once there was a {trait} {boy} named {who}.",
            "Long ago there lived a {boy} named {who}.",
            "One day a {boy} named {who} woke up early.",
        ),
    ),
    "close": (
        "",
        (
            " The end.",
            " That was the end of the day.",
            " They all lived happily ever after.",
            " And then it was time for bed.",
        ),
    ),
    "meet": (
        "who",
        (
            " A {boy} named {who} lived there too.",
            " There was also a {boy} named {who}.",
            " Soon a {boy} named {who} came along.",
            " {who} was a {trait} {boy}.",
        ),
    ),
    "arrive": (
        "who place",
        (
            " {who} was in the {place}.",
            " {who} came to the {place}.",
            " {who} waited in the {place}.",
            " {who} sat with {his} {animal} in the {place}.",
        ),
    ),
    "move": (
        "who place",
        (
            " {who} went to the {place}.",
            " {who} walked {adverb} to the {place}.",
            " {who} and {his} {animal} ran to the {place}.",
            " After {meal} {who} went to the {place}.",
            " {who} was {mood}, so {he} went to the {place}.",
            " Then {who} moved on to the {place}.",
        ),
    ),
    "see": (
        "thing colour",
        (
            " There was a {thing}. The {thing} was {colour}.",
            " Someone had lost a {size} {thing} that was {colour}.",
            " A {thing} lay in the grass, and it was {colour}.",
        ),
    ),
    "find": (
        "who thing colour",
        (
            " Someone sent a {thing} to {who}. The {thing} was {colour}.",
            " There was a {thing} for {who}, and it was {colour}.",
            " A {size} {thing} that came to {who} was {colour}.",
            " In the morning a {thing} came for {who}. It was {colour}.",
            " Someone left a {thing} with {who}, and it was {colour}.",
        ),
    ),
    "find, value first": (
        "who thing colour",
        (
            " {who} got a {thing}. The {thing} was {colour}.",
            " {who} found a {thing} that was {colour}.",
            " {who} had a {size} {thing}, and it was {colour}.",
            " In the morning {who} bought a {thing}. It was {colour}.",
            " {who} saw a {thing}, which was {colour}, and picked it up.",
        ),
    ),
    "give": (
        "who thing other",
        (
            " {who} sent the {thing} to {other}.",
            " {who} lent the {thing} to {other}.",
            " {other} borrowed the {thing} from {who}.",
        ),
    ),
    "spot": (
        "box place",
        (
            " There was a {box} in the {place}.",
            " A {size} {box} stood in the {place}.",
            " Someone had left a {box} in the {place}.",
        ),
    ),
    "carry": (
        "who box",
        (
            " There was a {box} with {who}.",
            " Someone had sent a {size} {box} to {who}.",
            " A {box} was put down with {who}.",
        ),
    ),
    "carry, value first": (
        "who box",
        (
            " {who} had a {box}.",
            " {who} carried a {size} {box}.",
            " {who} never went out without a {box}.",
        ),
    ),
    "fill": (
        "box thing colour",
        (
            " A {thing} lay in the {box}. The {thing} was {colour}.",
            " A {thing} was put in the {box}, and it was {colour}.",
            " A {size} {thing} that was in the {box} was {colour}.",
        ),
    ),
    "fill, value first": (
        "box thing colour",
        (
            " In the {box} was a {thing}. The {thing} was {colour}.",
            " There was a {thing} in the {box}, and it was {colour}.",
            " Inside the {box} lay a {size} {thing} that was {colour}.",
        ),
    ),
    "put": (
        "who thing box",
        (
            " {who} put the {thing} in the {box}.",
            " {who} hid the {thing} in the {box}.",
            " {who} dropped the {thing} {adverb} into the {box}.",
        ),
    ),
    "take": (
        "who thing box",
        (
            " {who} took the {thing} out of the {box}.",
            " {who} reached into the {box} and took the {thing}.",
        ),
    ),
    "leave": (
        "who object",
        (" {who} left the {object} in the|.", " {who} {adverb} put down the {object} in the|."),
    ),
    "fetch": (
        "who object",
        (" {who} picked up the {object} in the|.", " {who} went to get the {object} from the|."),
    ),
    "own": (
        "who number foods",
        (" {who} had {number} {foods}.", " {who} put {number} {foods} in {his} pocket."),
    ),
    "more": (
        "who number food",
        (" {who} found {number} more {food}.", " {who} bought {number} more {food} at noon."),
    ),
    "fewer": (
        "who number foods",
        (" {who} ate {number} of the {foods}.", " {who} gave away {number} of the {foods}."),
    ),
    "scene": (
        "",
        (
            " It was a {weather} day.",
            " The {animal} {noise} at the {beast}.",
            " A {animal} sat under a {plant}.",
            " Far away, a {animal} slept behind a {plant}.",
        ),
    ),
    "chat": (
        "who",
        (
            " {who} felt {mood}.",
            " {who} {did} {adverb}.",
            " {who} wanted to {play}.",
            " {who} dreamed about the {place}.",
            " {who} liked to talk about the {place}.",
            " {who} sang a song about a {colour} {animal}.",
        ),
    ),
    "mention where": (
        "who",
        (
            " {who} was still in the|, and {he} {did}.",
            " {who} looked around in the| and {did}.",
            " All this time {who} stayed in the|.",
        ),
    ),
    "mention colour": (
        "thing",
        (
            " The {thing} was still|.",
            " Everyone liked the {thing} because it was|.",
            " Even the {animal} could see that the {thing} was|.",
        ),
    ),
    "ask where": ("object", (" Where is the {object}? The {object} is still there in the|.",)),
    "ask where who": ("who", (" Where is {who}? {who} is in the|.",)),
    "ask who": ("object", (" Who has the {object}? The {object} is still there with|.",)),
    "ask inside": ("thing", (" What is the {thing} in? The {thing} was put down in the|.",)),
    "ask colour": ("thing", (" What colour is the {thing}? The {thing} has the colour|.",)),
    "ask colour of": (
        "who",
        (" What colour is the thing that {who} has? The thing of {who} has the colour|.",),
    ),
    "ask where shortly": ("object", (" Where is the {object}? The {object} is in the|.",)),
    "ask who shortly": ("object", (" Who has the {object}? The {object} is with|.",)),
    "ask colour shortly": ("thing", (" What colour is the {thing}? The {thing} is|.",)),
    "ask colour of shortly": (
        "who",
        (" What colour is the thing that {who} has? The thing that {who} has is|.",),
    ),
    "ask count": (
        "who foods",
        (" How many {foods} does {who} have? The number of {foods} that {who} has is|.",),
    ),
}
SHORT_OPENING = "One day"  # an "arrive" sentence follows, whose templates all begin with the name
SHORT_CLOSING = " The end."
SLOT = re.compile(r"\{(\w+)\}")


class Fragment(NamedTuple):
    """The part of a template before or after the answer word."""

    template: str
    free: tuple  # (slot, words) of every filler slot
    typed: tuple  # (slot, type) of every value that can be an answer, in text order


def compile_template(facts: str, template: str) -> tuple[Fragment, ...]:
    """Split a template into its fragments: one, or the two around the answer word."""
    taken = {*facts.split(), "he", "his", "boy"}
    return tuple(
        Fragment(
            text,
            tuple((s, FREE[s]) for s in dict.fromkeys(SLOT.findall(text)) if s not in taken),
            tuple((s, TYPES[s]) for s in SLOT.findall(text) if s in TYPES),
        )
        for text in template.split("|")
    )


COMPILED_TEMPLATES = {
    kind: tuple(compile_template(facts, template) for template in templates)
    for kind, (facts, templates) in TEMPLATES.items()
}


def vocabulary() -> list[str]:
    """Every pre-token that a story can contain, sorted: ``"Once"``, ``" park"``, ``"."``.

    Words have a leading space, except those that begin a story.
    """
    found = {
        *re.findall(r" ?[A-Za-z]+", SHORT_OPENING),
        *(f" {w}" for w in (*PLACES, *NUMBERS, *COLOURS)),
    }
    for _, templates in TEMPLATES.values():
        for template in templates:
            found |= {f" {word}" for slot in SLOT.findall(template) for word in FILLERS[slot]}
            found |= set(re.findall(r" ?[A-Za-z]+|[.,?]", re.sub(r" \{\w+\}", "", template)))
    return sorted(found)
