"""The facts of a story so far: which events are possible next, and which questions have which
answer.

Everything here is a deterministic function of the text so far.
"""

from collections.abc import Iterator

from minitx.training.stories.grammar import BOXES, NAMES, NUMBERS, PLACES, THINGS

IS_PLACE = frozenset(PLACES)
IS_PERSON = frozenset(NAMES)


class World:
    """Who and what is where.

    ``at`` maps each person, thing and box to where it directly is: a place, the person who has it,
    or (for a thing) a box. Following it repeatedly leads to the place.
    """

    def __init__(self):
        self.people, self.things, self.boxes = [], [], []
        self.at: dict[str, str] = {}
        self.colour: dict[str, str] = {}
        self.food: dict[str, tuple[str, int]] = {}  # person -> (kind of food, how many, 0 to 9)
        self.answered: dict[tuple[str, str], str] = {}  # (attribute, entity) -> last answer
        self.mentioned: dict[tuple[str, str], str] = {}  # (attribute, entity) -> last mention

    # Facts

    def chain(self, entity: str) -> list[str]:
        """The entity and what contains it, innermost first: ``["bell", "box", "Sam", "park"]``."""
        links = [entity]
        while entity in self.at:
            entity = self.at[entity]
            links.append(entity)
        return links

    def bridges(self, attribute: str, entity: str, value: str) -> tuple[str, ...]:
        """The bridge entities between a question's entity and its answer: ``("box", "Sam")``."""
        if attribute == "colour of":
            return tuple(thing for thing in self.things if self.at.get(thing) == entity)
        if attribute not in ("where", "who"):
            return ()
        links = self.chain(entity)
        return tuple(links[1 : links.index(value)])

    def unanswered_facts(self) -> list[tuple[str, str, str, str]]:
        """``facts`` whose question has not been answered with this value since it changed."""
        answered = self.answered
        return [fact for fact in self.facts() if answered.get(fact[1:3]) != fact[3]]

    def facts(self) -> Iterator[tuple[str, str, str, str]]:
        """Everything that can be asked, as ``(kind, attribute, entity, value)``."""
        at = self.at
        holders = [at.get(thing) for thing in self.things]
        for who in self.people:
            if who in at:
                yield "where1", "where", who, at[who]
            if who in self.food:
                yield "count", "count", who, NUMBERS[self.food[who][1]]
            if holders.count(who) == 1:
                yield "colour2", "colour of", who, self.colour[self.things[holders.index(who)]]
        for item in self.things + self.boxes:
            if item not in at:
                continue
            links = self.chain(item)
            place = links[-1] if links[-1] in IS_PLACE else None
            holder = links[-2] if place else links[-1]
            if holder in IS_PERSON:
                yield "who" if links[1] == holder else "who2", "who", item, holder
            if links[1] in self.boxes:
                yield "inside", "inside", item, links[1]
            if place and not (len(links) == 4 and self.has_shortcut(*links)):
                yield f"where{len(links) - 1}", "where", item, place
        for thing in self.things:
            yield "colour", "colour", thing, self.colour[thing]

    def has_shortcut(self, thing: str, box: str, person: str, place: str) -> bool:
        """Does an earlier answer shorten the chain thing -> box -> person -> place?

        Such an answer stated who has the thing, or the place of the box or of another thing in it.
        """
        answered, at = self.answered, self.at
        if answered.get(("where", box)) == place or answered.get(("who", thing)) == person:
            return True
        return any(at.get(t) == box and answered.get(("where", t)) == place for t in self.things)

    def in_reach(self, who: str, box: str) -> bool:
        """Does the person have the box, or are both in the same place?"""
        return self.at[box] == who or self.at[box] == self.at.get(who)

    # Possible events: the options of each kind of sentence, sampled uniformly

    def new_people(self) -> list[str]:
        return [name for name in NAMES if name not in self.people]

    def new_things(self) -> list[str]:
        return [thing for thing in THINGS if thing not in self.things]

    def new_boxes(self) -> list[str]:
        return [box for box in BOXES if box not in self.boxes]

    def possible_gifts(self) -> list[tuple[str, str, str]]:
        """(who, thing, other): things that people have, and everyone else."""
        return [
            (who, thing, other)
            for thing in self.things
            if (who := self.at.get(thing)) in IS_PERSON
            for other in self.people
            if other != who
        ]

    def possible_puts(self) -> list[tuple[str, str, str]]:
        """(who, thing, box): things that people have, and the boxes that they can reach."""
        return [
            (who, thing, box)
            for thing in self.things
            if (who := self.at.get(thing)) in IS_PERSON
            for box in self.boxes
            if self.in_reach(who, box)
        ]

    def possible_takes(self) -> list[tuple[str, str, str]]:
        """(who, thing, box): things in boxes, and the people who can reach the box."""
        return [
            (who, thing, box)
            for thing in self.things
            if (box := self.at.get(thing)) in self.boxes
            for who in self.people
            if self.in_reach(who, box)
        ]

    def possible_leaves(self) -> list[tuple[str, str]]:
        """(who, item): things and boxes of people whose place is known."""
        return [
            (who, item)
            for item in self.things + self.boxes
            if (who := self.at.get(item)) in IS_PERSON and who in self.at
        ]

    def possible_fetches(self) -> list[tuple[str, str]]:
        """(who, item): everyone, and the things and boxes that are in some place."""
        items = [item for item in self.things + self.boxes if self.at.get(item) in IS_PLACE]
        return [(who, item) for item in items for who in self.people]

    def people_without_food(self) -> list[str]:
        return [who for who in self.people if who not in self.food]

    def possible_mentions(self, places: bool, colours: bool) -> list[tuple[str, str, str]]:
        """(attribute, entity, value): places of people and colours of things, if wanted, not stated
        again since they changed."""
        facts = []
        if places:
            facts += [("where", who, self.at[who]) for who in self.people if who in self.at]
        if colours:
            facts += [("colour", thing, self.colour[thing]) for thing in self.things]
        answered, mentioned = self.answered, self.mentioned
        return [
            fact for fact in facts if answered.get(fact[:2]) != fact[2] != mentioned.get(fact[:2])
        ]
