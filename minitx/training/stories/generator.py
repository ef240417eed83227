"""The story generator: samples what happens next and updates the world accordingly.

``StoryGenerator.generate`` is the loop. Each kind of sentence is an entry of ``ACTIONS``: the
options it has (given the world and the limits of the grade), and the method that writes the sampled
one.
"""

import re
from collections.abc import Callable

from minitx.training.stories.grades import ROOM, Grade
from minitx.training.stories.grammar import (
    COLOURS,
    COMPILED_TEMPLATES,
    FOODS,
    NAMES,
    NUMBERS,
    PLACES,
    SHORT_CLOSING,
    SHORT_OPENING,
)
from minitx.training.stories.world import IS_PERSON, World
from minitx.training.stories.writer import Story, Writer


class StoryGenerator:
    """Generates one story. ``uniform()`` returns the next random number in [0, 1)."""

    def __init__(self, grade: Grade, uniform: Callable[[], float]):
        self.grade, self.world, self.writer = grade, World(), Writer(uniform, grade.wordings)
        self.sample = self.writer.sample
        self.questions = 0  # asked so far
        self.recap_facts = []  # (type of value, value, sentence) of what the recap will repeat
        self.recap_words = 0  # length of the recap
        self.kinds = [
            (kind, *how, grade.sentences[kind])
            for kind, how in ACTIONS.items()
            if grade.sentences.get(kind, 0) > 0
        ]

    def generate(self) -> Story:
        if self.grade.phrases:
            self.meet(self.sample(NAMES), template="open")
        else:
            self.writer.add_text(SHORT_OPENING)
            self.arrive(self.sample(NAMES))
        while (sentence := self.next_sentence()) is not None:
            write, options = sentence
            write(self, self.sample(options))
        if self.grade.recap:
            self.recap(in_order=self.grade.recap == "same")
        if self.grade.phrases:
            self.add_sentence("close")
        else:
            self.writer.add_text(SHORT_CLOSING)
        return self.writer.story()

    def next_sentence(self):
        """Sample the kind of the next sentence: (method that writes it, its options), or None if
        the story ends here."""
        grade = self.grade
        words = self.writer.words + self.recap_words
        if words > grade.max_words - ROOM or self.questions >= grade.max_questions:
            return None
        too_few_people = len(self.world.people) < grade.min_people
        possible = []
        for kind, options_of, write, weight in self.kinds:
            options = () if too_few_people and kind not in FIRST_KINDS else options_of(self)
            if options:
                possible.append((write, options, weight))
        if not too_few_people:
            for kind, facts in self.open_questions().items():
                possible.append((StoryGenerator.question, facts, grade.questions[kind]))
        if not possible:
            return None
        if self.writer.words >= grade.min_words and self.questions >= grade.min_questions:
            if self.writer.bernoulli(grade.stop):
                return None
        return self.writer.sample_weighted(possible)[:2]

    # New people, things and boxes

    def meet(self, who, template="meet"):
        self.world.people.append(who)
        self.add_sentence(template, who=who)

    def arrive(self, who):
        self.world.people.append(who)
        place = self.world.at[who] = self.sample(PLACES)
        self.add_fact_sentence("place", "arrive", who=who, place=place)

    def new_thing(self) -> dict[str, str]:
        """A thing that is new in the story, and its colour."""
        thing, colour = self.sample(self.world.new_things()), self.sample(COLOURS)
        self.world.things.append(thing)
        self.world.colour[thing] = colour
        return {"thing": thing, "colour": colour}

    def see(self, _):
        self.add_fact_sentence("colour", "see", **self.new_thing())

    def find(self, who):
        new = self.new_thing()
        self.world.at[new["thing"]] = who
        self.add_fact_sentence("colour", "find", who=who, **new)

    def fill(self, box):
        new = self.new_thing()
        self.world.at[new["thing"]] = box
        self.add_sentence("fill", box=box, **new)

    def spot(self, box):
        self.world.boxes.append(box)
        place = self.world.at[box] = self.sample(PLACES)
        self.add_sentence("spot", box=box, place=place)

    def carry(self, who):
        box = self.sample(self.world.new_boxes())
        self.world.boxes.append(box)
        self.world.at[box] = who
        self.add_sentence("carry", who=who, box=box)

    # State changes

    def move(self, who):
        here = self.world.at.get(who)
        place = self.world.at[who] = self.sample([place for place in PLACES if place != here])
        self.add_sentence("move", who=who, place=place)

    def give(self, option):
        who, thing, other = option
        self.world.at[thing] = other
        self.add_sentence("give", who=who, thing=thing, other=other)

    def put(self, option):
        who, thing, box = option
        self.world.at[thing] = box
        self.add_sentence("put", who=who, thing=thing, box=box)

    def take(self, option):
        who, thing, box = option
        self.world.at[thing] = who
        self.add_sentence("take", who=who, thing=thing, box=box)

    def leave(self, option):
        who, item = option
        place = self.world.at[item] = self.world.at[who]
        self.writer.add_answer_sentence("mention", "leave", "place", place, who=who, object=item)

    def fetch(self, option):
        who, item = option
        place = self.world.at[item]
        self.world.at[who], self.world.at[item] = place, who
        # The sentence states the item's place, so asking for it would need no chain of facts.
        self.world.answered["where", item] = place
        self.writer.add_answer_sentence("mention", "fetch", "place", place, who=who, object=item)

    def own(self, who):
        food, number = self.sample(FOODS), self.sample((2, 3, 4, 5))
        self.world.food[who] = (food, number)
        self.world.answered["count", who] = NUMBERS[number]  # stated: no sum yet
        self.add_fact_sentence("number", "own", who=who, number=NUMBERS[number], foods=food + "s")

    def change(self, who):
        food, had = self.world.food[who]
        by = self.sample([n for n in (-3, -2, -1, 1, 2, 3) if 0 <= had + n <= 9])
        self.world.food[who] = (food, had + by)
        if by > 0:
            self.add_sentence(
                "more", who=who, number=NUMBERS[by], food=food if by == 1 else food + "s"
            )
        else:
            self.add_sentence("fewer", who=who, number=NUMBERS[-by], foods=food + "s")

    # Mentions, recap and questions

    def can_mention(self):
        """Facts to mention: places or colours, once the story has named at least two of them."""
        named = self.writer.named
        places, colours = (len(named[QUESTIONS[kind][1]]) > 1 for kind in ("where", "colour"))
        return self.world.possible_mentions(places, colours)

    def mention(self, fact):
        attribute, entity, value = fact
        _, value_type, slot = QUESTIONS["where who" if attribute == "where" else attribute]
        self.world.mentioned[attribute, entity] = value
        self.writer.add_answer_sentence(
            "mention", f"mention {attribute}", value_type, value, **{slot: entity}
        )

    def add_sentence(self, template: str, **slots: str):
        """Add a sentence from that template, with the value before its key if the grade says so."""
        value_first = f"{template}, value first"
        known = self.grade.value_first and value_first in COMPILED_TEMPLATES
        self.writer.add_sentence(value_first if known else template, **slots)

    def add_fact_sentence(self, slot: str, template: str, **slots: str):
        """Add a sentence whose slot ``slot`` holds a value that only this sentence states."""
        self.add_sentence(template, **slots)
        if self.grade.recap:
            sentence = self.writer.pieces[-1][0]
            self.recap_facts.append((slot, slots[slot], sentence))
            self.recap_words += sentence.count(" ")

    def recap(self, in_order: bool):
        """Repeat every sentence that stated a fact, verbatim, in the same or in random order. This
        is the simplest task from which a model learns to look up facts. The repeated value is
        marked as an answer, unless another sentence still to come has the same beginning: then the
        text so far does not determine the value."""
        left = list(self.recap_facts)
        while left:
            fact = left[0] if in_order else self.sample(left)
            left.remove(fact)
            value_type, value, sentence = fact
            before, after = re.split(rf" {value}\b", sentence)
            if not in_order and any(other.startswith(before) for _, _, other in left):
                self.writer.add_text(sentence)
                self.writer.record(value_type, value)
                continue
            self.writer.add_text(before)
            self.writer.add_answer("mention", value_type, value)
            self.writer.add_text(after)

    def open_questions(self):
        """Kind of question -> the facts that it can ask for.

        These are not answered yet, and the story has named at least two values of their type.
        """
        weights, named, facts = self.grade.questions, self.writer.named, {}
        for fact in self.world.unanswered_facts():
            kind, attribute, _, _ = fact
            if weights.get(kind, 0) > 0 and len(named[QUESTIONS[attribute][1]]) > 1:
                facts.setdefault(kind, []).append(fact)
        return facts

    def question(self, fact):
        kind, attribute, entity, value = fact
        self.world.answered[attribute, entity] = value
        self.questions += 1
        of_person = attribute == "where" and entity in IS_PERSON
        template, value_type, slot = QUESTIONS["where who" if of_person else attribute]
        slots = {slot: entity}
        if kind in self.grade.shortly and not of_person:
            template += " shortly"
        if attribute == "count":
            slots["foods"] = self.world.food[entity][0] + "s"
        bridges = self.world.bridges(attribute, entity, value)
        self.writer.add_answer_sentence(kind, template, value_type, value, bridges, **slots)

    # Limits of the grade: the options, or none if the limit is reached

    def newcomers(self):
        return self.world.new_people() if len(self.world.people) < self.grade.max_people else ()

    def within_max_things(self, options):
        return options if len(self.world.things) < self.grade.max_things else ()

    def within_max_boxes(self, options):
        return options if len(self.world.boxes) < self.grade.max_boxes else ()


QUESTIONS = {  # attribute: (name of the template, type of the answer, slot of the entity)
    "where": ("ask where", "place", "object"),
    "where who": ("ask where who", "place", "who"),
    "who": ("ask who", "name", "object"),
    "colour": ("ask colour", "colour", "thing"),
    "colour of": ("ask colour of", "colour", "who"),
    "count": ("ask count", "number", "who"),
    "inside": ("ask inside", "box", "thing"),
}
# The only kinds until there are min_people people: a question needs at least two candidates.
FIRST_KINDS = ("meet", "arrive", "move", "scene", "chat")
# kind of sentence: (its options, the method that writes one of them). No options: not possible now.
ACTIONS = {
    "meet": (StoryGenerator.newcomers, StoryGenerator.meet),
    "arrive": (StoryGenerator.newcomers, StoryGenerator.arrive),
    "move": (lambda g: g.world.people, StoryGenerator.move),
    "see": (lambda g: g.within_max_things(("a thing",)), StoryGenerator.see),
    "find": (lambda g: g.within_max_things(g.world.people), StoryGenerator.find),
    "give": (lambda g: g.world.possible_gifts(), StoryGenerator.give),
    "spot": (lambda g: g.within_max_boxes(g.world.new_boxes()), StoryGenerator.spot),
    "carry": (lambda g: g.within_max_boxes(g.world.people), StoryGenerator.carry),
    "fill": (lambda g: g.within_max_things(g.world.boxes), StoryGenerator.fill),
    "put": (lambda g: g.world.possible_puts(), StoryGenerator.put),
    "take": (lambda g: g.world.possible_takes(), StoryGenerator.take),
    "leave": (lambda g: g.world.possible_leaves(), StoryGenerator.leave),
    "fetch": (lambda g: g.world.possible_fetches(), StoryGenerator.fetch),
    "own": (lambda g: g.world.people_without_food(), StoryGenerator.own),
    "change": (lambda g: list(g.world.food), StoryGenerator.change),
    "mention": (StoryGenerator.can_mention, StoryGenerator.mention),
    "scene": (lambda g: ("scene",), lambda g, _: g.add_sentence("scene")),
    "chat": (lambda g: g.world.people, lambda g, who: g.add_sentence("chat", who=who)),
}
