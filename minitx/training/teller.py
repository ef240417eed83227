"""Tells one story: draws what happens next, and keeps the world in step with what is written.

``Teller.tell`` is the loop. Each kind of sentence is a line of ``SENTENCES``: which options it has
(from the world and the limits of the grade), and the method that tells the one that was drawn.
"""

import re
from collections.abc import Callable

from minitx.training.grades import ROOM, Grade
from minitx.training.words import (
    COLOURS,
    FOODS,
    NAMES,
    NUMBERS,
    PLACES,
    SHORT_CLOSING,
    SHORT_OPENING,
    WORDINGS,
)
from minitx.training.world import IS_PERSON, World
from minitx.training.writer import Story, Writer


class Teller:
    """One story in the making. ``uniform()`` gives the next random number in [0, 1)."""

    def __init__(self, grade: Grade, uniform: Callable[[], float]):
        self.grade, self.world, self.writer = grade, World(), Writer(uniform, grade.wordings)
        self.pick = self.writer.pick
        self.questions = 0  # asked so far
        self.news = []  # (type of value, value, sentence) of all that a recap will tell again
        self.recap_words = 0  # that it will take
        self.kinds = [
            (kind, *how, grade.sentences[kind])
            for kind, how in SENTENCES.items()
            if grade.sentences.get(kind, 0) > 0
        ]

    def tell(self) -> Story:
        """The whole story."""
        if self.grade.phrases:
            self.meet(self.pick(NAMES), wording="open")
        else:
            self.writer.add(SHORT_OPENING)
            self.arrive(self.pick(NAMES))
        while (sentence := self.next_sentence()) is not None:
            tell, options = sentence
            tell(self, self.pick(options))
        if self.grade.recap:
            self.recap(in_order=self.grade.recap == "same")
        if self.grade.phrases:
            self.say("close")
        else:
            self.writer.add(SHORT_CLOSING)
        return self.writer.story()

    def next_sentence(self):
        """How to tell it and the options that it has, or None where the story ends."""
        grade = self.grade
        words = self.writer.words + self.recap_words
        if words > grade.max_words - ROOM or self.questions >= grade.max_questions:
            return None
        gathering = len(self.world.people) < grade.min_people
        possible = []
        for kind, can, tell, weight in self.kinds:
            options = () if gathering and kind not in EARLY else can(self)
            if options:
                possible.append((tell, options, weight))
        if not gathering:
            for kind, facts in self.open_questions().items():
                possible.append((Teller.question, facts, grade.questions[kind]))
        if not possible:
            return None
        if self.writer.words >= grade.min_words and self.questions >= grade.min_questions:
            if self.writer.chance(grade.stop):
                return None
        return self.writer.pick_weighted(possible)[:2]

    # New people, things and boxes.

    def meet(self, who, wording="meet"):
        self.world.people.append(who)
        self.say(wording, who=who)

    def arrive(self, who):
        self.world.people.append(who)
        place = self.world.at[who] = self.pick(PLACES)
        self.say_news("place", "arrive", who=who, place=place)

    def new_thing(self) -> dict[str, str]:
        """A thing that the story has not had yet, and its colour."""
        thing, colour = self.pick(self.world.new_things()), self.pick(COLOURS)
        self.world.things.append(thing)
        self.world.colour[thing] = colour
        return {"thing": thing, "colour": colour}

    def see(self, _):
        self.say_news("colour", "see", **self.new_thing())

    def find(self, who):
        new = self.new_thing()
        self.world.at[new["thing"]] = who
        self.say_news("colour", "find", who=who, **new)

    def fill(self, box):
        new = self.new_thing()
        self.world.at[new["thing"]] = box
        self.say("fill", box=box, **new)

    def spot(self, box):
        self.world.boxes.append(box)
        place = self.world.at[box] = self.pick(PLACES)
        self.say("spot", box=box, place=place)

    def carry(self, who):
        box = self.pick(self.world.new_boxes())
        self.world.boxes.append(box)
        self.world.at[box] = who
        self.say("carry", who=who, box=box)

    # Changes.

    def move(self, who):
        here = self.world.at.get(who)
        place = self.world.at[who] = self.pick([place for place in PLACES if place != here])
        self.say("move", who=who, place=place)

    def give(self, option):
        who, thing, other = option
        self.world.at[thing] = other
        self.say("give", who=who, thing=thing, other=other)

    def put(self, option):
        who, thing, box = option
        self.world.at[thing] = box
        self.say("put", who=who, thing=thing, box=box)

    def take(self, option):
        who, thing, box = option
        self.world.at[thing] = who
        self.say("take", who=who, thing=thing, box=box)

    def leave(self, option):
        who, item = option
        place = self.world.at[item] = self.world.at[who]
        self.writer.say_answer("mention", "leave", "place", place, who=who, object=item)

    def fetch(self, option):
        who, item = option
        place = self.world.at[item]
        self.world.at[who], self.world.at[item] = place, who
        # The sentence tells where the item is now: to ask for that would need no chain.
        self.world.told["where", item] = place
        self.writer.say_answer("mention", "fetch", "place", place, who=who, object=item)

    def own(self, who):
        food, number = self.pick(FOODS), self.pick((2, 3, 4, 5))
        self.world.food[who] = (food, number)
        self.world.told["count", who] = NUMBERS[number]  # told already: nothing to add up yet
        self.say_news("number", "own", who=who, number=NUMBERS[number], foods=food + "s")

    def change(self, who):
        food, had = self.world.food[who]
        by = self.pick([n for n in (-3, -2, -1, 1, 2, 3) if 0 <= had + n <= 9])
        self.world.food[who] = (food, had + by)
        if by > 0:
            self.say("more", who=who, number=NUMBERS[by], food=food if by == 1 else food + "s")
        else:
            self.say("fewer", who=who, number=NUMBERS[-by], foods=food + "s")

    # Recall.

    def can_mention(self):
        """Places and colours, where the story has named at least two of them."""
        enough = {kind: len(self.writer.named[ASKS[kind][1]]) > 1 for kind in ("where", "colour")}
        return [fact for fact in self.world.mentionable() if enough[fact[0]]]

    def mention(self, fact):
        attribute, entity, value = fact
        _, value_type, slot = ASKS["where who" if attribute == "where" else attribute]
        self.world.repeated[attribute, entity] = value
        self.writer.say_answer(
            "mention", f"mention {attribute}", value_type, value, **{slot: entity}
        )

    def say(self, wording: str, **slots: str):
        """A sentence of that kind, with the value before its key if the grade wants that."""
        value_first = f"{wording}, value first"
        known = self.grade.value_first and value_first in WORDINGS
        self.writer.say(value_first if known else wording, **slots)

    def say_news(self, slot: str, wording: str, **slots: str):
        """A sentence whose slot ``slot`` holds a value that only this sentence tells."""
        self.say(wording, **slots)
        if self.grade.recap:
            sentence = self.writer.pieces[-1][0]
            self.news.append((slot, slots[slot], sentence))
            self.recap_words += sentence.count(" ")

    def recap(self, in_order: bool):
        """All news once more, word for word, in their order or in any. With nothing else to learn,
        here a model first finds out how to look things up: what a sentence tells is an answer,
        unless there are two that begin alike, so that it is not clear yet which one this is."""
        left = list(self.news)
        while left:
            news = left[0] if in_order else self.pick(left)
            left.remove(news)
            value_type, value, sentence = news
            before, after = re.split(rf" {value}\b", sentence)
            if not in_order and any(other.startswith(before) for _, _, other in left):
                self.writer.add(sentence)
                self.writer.note(value_type, value)
                continue
            self.writer.add(before)
            self.writer.answer("mention", value_type, value)
            self.writer.add(after)

    def open_questions(self):
        """Kind of question -> the facts that it can ask for.

        They are news, and the story has named at least two values of their type.
        """
        weights, facts = self.grade.questions, {}
        for fact in self.world.facts():
            kind, attribute, entity, value = fact
            if weights.get(kind, 0) > 0 and self.world.is_news(attribute, entity, value):
                if len(self.writer.named[ASKS[attribute][1]]) > 1:
                    facts.setdefault(kind, []).append(fact)
        return facts

    def question(self, fact):
        kind, attribute, entity, value = fact
        self.world.told[attribute, entity] = value
        self.questions += 1
        of_person = attribute == "where" and entity in IS_PERSON
        wording, value_type, slot = ASKS["where who" if of_person else attribute]
        slots = {slot: entity}
        if kind in self.grade.shortly and not of_person:
            wording += " shortly"
        if attribute == "count":
            slots["foods"] = self.world.food[entity][0] + "s"
        via = self.world.via(attribute, entity, value)
        self.writer.say_answer(kind, wording, value_type, value, via, **slots)

    # Limits of the grade.

    def if_people(self, options):
        return options if len(self.world.people) < self.grade.max_people else ()

    def if_things(self, options):
        return options if len(self.world.things) < self.grade.max_things else ()

    def if_boxes(self, options):
        return options if len(self.world.boxes) < self.grade.max_boxes else ()


ASKS = {  # attribute: (wording of the question, type of the answer, slot of the entity)
    "where": ("ask where", "place", "object"),
    "where who": ("ask where who", "place", "who"),
    "who": ("ask who", "name", "object"),
    "colour": ("ask colour", "colour", "thing"),
    "colour of": ("ask colour of", "colour", "who"),
    "count": ("ask count", "number", "who"),
    "inside": ("ask inside", "box", "thing"),
}
# Until a story has its first few people, nothing else happens: one cannot ask about less than two.
EARLY = ("meet", "arrive", "move", "scene", "chat")
# kind: (its options, how to tell one of them). Without options it cannot happen.
SENTENCES = {
    "meet": (lambda t: t.if_people(t.world.new_people()), Teller.meet),
    "arrive": (lambda t: t.if_people(t.world.new_people()), Teller.arrive),
    "move": (lambda t: t.world.people, Teller.move),
    "see": (lambda t: t.if_things(("a thing",)), Teller.see),
    "find": (lambda t: t.if_things(t.world.people), Teller.find),
    "give": (lambda t: t.world.gifts(), Teller.give),
    "spot": (lambda t: t.if_boxes(t.world.new_boxes()), Teller.spot),
    "carry": (lambda t: t.if_boxes(t.world.people), Teller.carry),
    "fill": (lambda t: t.if_things(t.world.boxes), Teller.fill),
    "put": (lambda t: t.world.puts(), Teller.put),
    "take": (lambda t: t.world.takes(), Teller.take),
    "leave": (lambda t: t.world.leavable(), Teller.leave),
    "fetch": (lambda t: t.world.lying(), Teller.fetch),
    "own": (lambda t: t.world.without_food(), Teller.own),
    "change": (lambda t: list(t.world.food), Teller.change),
    "mention": (Teller.can_mention, Teller.mention),
    "scene": (lambda t: ("scene",), lambda t, _: t.say("scene")),
    "chat": (lambda t: t.world.people, lambda t, who: t.say("chat", who=who)),
}
