"""An independent story reader: parses the text with regular expressions, tracks the facts itself,
and derives every answer again.

It shares the word lists with the generator, but no code.
"""

import re

from minitx.training.stories.grammar import BOXES, NUMBERS, THINGS


class Reader:
    """``read(text)`` returns ``[(kind, answer), ...]`` and fails if a text contradicts itself."""

    def __init__(self):
        self.place, self.holder, self.colour, self.inside, self.food = {}, {}, {}, {}, {}
        self.answers, self.asked = [], {}
        self.bridges = []  # bridge entities of each question where, who, colour of
        self.facts, self.repeated = [], []  # sentences that a recap repeats; those repeated so far

    def read(self, text):
        # Two sentences that state one fact are read as one.
        both = r"[A-Z][^.?]*\. (?:The [a-z]+|It) was [a-z]+\."
        one = r"[A-Z][^.?]*[.?]"
        sentences = re.findall(f"{both}|{one}", re.sub(r"^One day (?=[A-Z])", "", text))
        assert " ".join(sentences) == re.sub(r"^One day (?=[A-Z])", "", text)
        question = None
        for sentence in sentences:
            if sentence.endswith("?"):
                question = sentence
            elif question:
                self.answer(question, sentence)
                question = None
            else:
                self.sentence(sentence)
        assert question is None
        assert not self.repeated or sorted(self.repeated) == sorted(self.facts), "incomplete recap"
        return self.answers

    def put_at(self, item, *, holder=None, box=None, place=None):
        for facts, value in ((self.holder, holder), (self.inside, box), (self.place, place)):
            facts.pop(item, None)
            if value:
                facts[item] = value

    def sentence(self, sentence):
        if sentence in self.facts:
            self.repeat(sentence)
            return
        assert not self.repeated or re.fullmatch(self.CLOSING, sentence), (
            f"not a fact to repeat: {sentence}"
        )
        for pattern, act in self.RULES:
            if match := re.fullmatch(pattern, sentence):
                act(self, *match.groups())
                break
        else:
            assert any(re.fullmatch(pattern, sentence) for pattern in self.NO_FACT), sentence
        if any(re.fullmatch(pattern, sentence) for pattern, _ in self.FACTS):
            self.facts.append(sentence)

    def repeat(self, sentence):
        """A sentence that stated a fact before, verbatim, as part of a recap."""
        assert sentence not in self.repeated, sentence
        for pattern, fact in self.FACTS:
            if match := re.fullmatch(pattern, sentence):
                self.check_repeated(sentence, *fact(self, *match.groups()))
        self.repeated.append(sentence)

    def check_repeated(self, sentence, derived, said):
        """It is an answer if no other sentence left has the same beginning."""
        assert derived == said
        before = re.split(rf" {said}\b", sentence)[0]
        left = set(self.facts) - set(self.repeated) - {sentence}
        if not any(re.match(rf"{before}\b", other) for other in left):
            self.check_answer("mention", derived, said)

    def arrived(self, who, place):
        assert who not in self.place
        self.place[who] = place

    def changed(self, who, by, food):
        assert self.food[who][0] == food.rstrip("s")
        self.food[who] = (self.food[who][0], self.food[who][1] + by)

    def own(self, who, number, food):
        self.food[who] = (food.rstrip("s"), NUMBERS.index(number))

    def found(self, thing, colour, again=None, **where):
        assert again in (None, thing)
        self.put_at(thing, **where)
        self.colour[thing] = colour

    def given(self, who, thing, other):
        assert self.holder[thing] == who
        self.put_at(thing, holder=other)

    def check_reach(self, who, box):
        near = self.place.get(box) is not None and self.place.get(box) == self.place.get(who)
        assert self.holder.get(box) == who or near

    def put(self, who, thing, box):
        assert self.holder[thing] == who
        self.check_reach(who, box)
        self.put_at(thing, box=box)

    def taken(self, who, thing, box):
        assert self.inside[thing] == box
        self.check_reach(who, box)
        self.put_at(thing, holder=who)

    def left(self, who, item, place):
        assert self.holder[item] == who
        self.check_answer("mention", self.place[who], place)
        self.put_at(item, place=place)

    def fetched(self, who, item, place):
        self.check_answer("mention", self.place[item], place)
        self.put_at(item, holder=who)
        self.place[who] = place

    def check_answer(self, kind, derived, said):
        assert derived == said
        self.answers.append((kind, said))

    W = r"([A-Z][a-z]+)"  # a name
    x = r"([a-z]+)"  # any other word
    RULES = [
        (rf"{W} (?:was in|came to|waited in|sat with \w+ \w+ in) the {x}\.", arrived),
        (rf"{W} (?:went to|moved on to) the {x}\.",
         lambda s, who, place: s.place.update({who: place})),
        (rf"(?:Then |After \w+ ){W} (?:went|moved on) to the {x}\.",
         lambda s, who, place: s.place.update({who: place})),
        (rf"{W} (?:walked \w+|and \w+ \w+ ran|was \w+, so s?he went) to the {x}\.",
         lambda s, who, place: s.place.update({who: place})),
        (rf"Someone sent a {x} to {W}\. The {x} was {x}\.",
         lambda s, thing, who, again, colour: s.found(thing, colour, again, holder=who)),
        (rf"(?:There was a {x} for|In the morning a {x} came for|Someone left a {x} with) {W}"
         rf"(?:, and it was|\. It was) {x}\.",
         lambda s, a, b, c, who, colour: s.found(a or b or c, colour, holder=who)),
        (rf"A \w+ {x} that came to {W} was {x}\.",
         lambda s, thing, who, colour: s.found(thing, colour, holder=who)),
        (rf"{W} got a {x}\. The {x} was {x}\.",
         lambda s, who, thing, again, colour: s.found(thing, colour, again, holder=who)),
        (rf"{W} found a {x} that was {x}\.",
         lambda s, who, thing, colour: s.found(thing, colour, holder=who)),
        (rf"{W} had a \w+ {x}, and it was {x}\.",
         lambda s, who, thing, colour: s.found(thing, colour, holder=who)),
        (rf"In the morning {W} bought a {x}\. It was {x}\.",
         lambda s, who, thing, colour: s.found(thing, colour, holder=who)),
        (rf"{W} saw a {x}, which was {x}, and picked it up\.",
         lambda s, who, thing, colour: s.found(thing, colour, holder=who)),
        (rf"There was a {x}\. The {x} was {x}\.",
         lambda s, thing, again, colour: s.found(thing, colour, again)),
        (rf"Someone had lost a \w+ {x} that was {x}\.", found),
        (rf"A {x} lay in the grass, and it was {x}\.", found),
        (rf"{W} (?:sent|lent) the {x} to {W}\.", given),
        (rf"{W} borrowed the {x} from {W}\.",
         lambda s, other, thing, who: s.given(who, thing, other)),
        (rf"(?:There was|Someone had left|A \w+) (?:a )?{x}(?: stood)? in the "
         rf"((?!{'|'.join(BOXES)})[a-z]+)\.",
         lambda s, box, place: s.put_at(box, place=place)),
        (rf"(?:There was a {x}|Someone had sent a \w+ {x}|A {x} was put down) (?:with|to) {W}\.",
         lambda s, a, b, c, who: s.put_at(a or b or c, holder=who)),
        (rf"A {x} lay in the {x}\. The {x} was {x}\.",
         lambda s, thing, box, again, colour: s.found(thing, colour, again, box=box)),
        (rf"A {x} was put in the {x}, and it was {x}\.",
         lambda s, thing, box, colour: s.found(thing, colour, box=box)),
        (rf"A \w+ {x} that was in the {x} was {x}\.",
         lambda s, thing, box, colour: s.found(thing, colour, box=box)),
        (rf"{W} (?:had|never went out without) a {x}\.",
         lambda s, who, box: s.put_at(box, holder=who)),
        (rf"{W} carried a \w+ {x}\.", lambda s, who, box: s.put_at(box, holder=who)),
        (rf"In the {x} was a {x}\. The {x} was {x}\.",
         lambda s, box, thing, again, colour: s.found(thing, colour, again, box=box)),
        (rf"There was a {x} in the {x}, and it was {x}\.",
         lambda s, thing, box, colour: s.found(thing, colour, box=box)),
        (rf"Inside the {x} lay a \w+ {x} that was {x}\.",
         lambda s, box, thing, colour: s.found(thing, colour, box=box)),
        (rf"{W} (?:put|hid) the {x} in the {x}\.", put),
        (rf"{W} dropped the {x} \w+ into the {x}\.", put),
        (rf"{W} took the {x} out of the {x}\.", taken),
        (rf"{W} reached into the {x} and took the {x}\.",
         lambda s, who, box, thing: s.taken(who, thing, box)),
        (rf"{W} (?:left|\w+ly put down) the {x} in the {x}\.", left),
        (rf"{W} (?:picked up the {x} in|went to get the {x} from) the {x}\.",
         lambda s, who, one, two, place: s.fetched(who, one or two, place)),
        (rf"{W} (?:had|put) (two|three|four|five) {x}(?: in \w+ pocket)?\.", own),
        (rf"{W} (?:found|bought) {x} more {x}(?: at noon)?\.",
         lambda s, who, n, food: s.changed(who, NUMBERS.index(n), food)),
        (rf"{W} (?:ate|gave away) {x} of the {x}\.",
         lambda s, who, n, food: s.changed(who, -NUMBERS.index(n), food)),
        (rf"{W} was still in the {x}, and s?he \w+\.",
         lambda s, who, place: s.check_answer("mention", s.place[who], place)),
        (rf"{W} looked around in the {x} and \w+\.",
         lambda s, who, place: s.check_answer("mention", s.place[who], place)),
        (rf"All this time {W} stayed in the {x}\.",
         lambda s, who, place: s.check_answer("mention", s.place[who], place)),
        (rf"The {x} was still {x}\.", lambda s, t, c: s.check_answer("mention", s.colour[t], c)),
        (rf"Everyone liked the {x} because it was {x}\.",
         lambda s, t, c: s.check_answer("mention", s.colour[t], c)),
        (rf"Even the \w+ could see that the {x} was {x}\.",
         lambda s, t, c: s.check_answer("mention", s.colour[t], c)),
    ]  # fmt: skip
    # Sentences that a recap may repeat -> (the fact, the value in the sentence).
    FACTS = [
        (rf"{W} (?:was in|came to|waited in|sat with \w+ \w+ in) the {x}\.",
         lambda s, who, place: (s.place[who], place)),
        (rf"(?:{W} got|There was) a {x}\. The {x} was {x}\.",
         lambda s, who, thing, again, colour: (s.colour[thing], colour)),
        (rf"Someone sent a {x} to \w+\. The {x} was {x}\.",
         lambda s, thing, again, colour: (s.colour[thing], colour)),
        (rf"(?:There was a {x} for|In the morning a {x} came for|Someone left a {x} with) \w+"
         rf"(?:, and it was|\. It was) {x}\.",
         lambda s, a, b, c, colour: (s.colour[a or b or c], colour)),
        (rf"A \w+ {x} that came to \w+ was {x}\.",
         lambda s, thing, colour: (s.colour[thing], colour)),
        (rf"(?:{W} found|Someone had lost) a(?: \w+)? {x} that was {x}\.",
         lambda s, who, thing, colour: (s.colour[thing], colour)),
        (rf"{W} had a \w+ {x}, and it was {x}\.",
         lambda s, who, thing, colour: (s.colour[thing], colour)),
        (rf"In the morning {W} bought a {x}\. It was {x}\.",
         lambda s, who, thing, colour: (s.colour[thing], colour)),
        (rf"{W} saw a {x}, which was {x}, and picked it up\.",
         lambda s, who, thing, colour: (s.colour[thing], colour)),
        (rf"A {x} lay in the grass, and it was {x}\.",
         lambda s, thing, colour: (s.colour[thing], colour)),
        (rf"{W} (?:had|put) (two|three|four|five) {x}(?: in \w+ pocket)?\.",
         lambda s, who, number, food: (NUMBERS[s.food[who][1]], number)),
    ]  # fmt: skip
    CLOSING = (
        r"The end\.|That was the end of the day\.|And then it was time for bed\."
        r"|They all lived happily ever after\."
    )
    NO_FACT = [
        r"Once upon a time there was a (boy|girl) named \w+\.",
        r"Once there was a \w+ (boy|girl) named \w+\.",
        r"Long ago there lived a (boy|girl) named \w+\.",
        r"One day a (boy|girl) named \w+ woke up early\.",
        r"A (boy|girl) named \w+ lived there too\.",
        r"There was also a (boy|girl) named \w+\.",
        r"Soon a (boy|girl) named \w+ came along\.",
        r"\w+ was a \w+ (boy|girl)\.",
        CLOSING,
        r"It was a \w+ day\.|The \w+ \w+ at the \w+\.|A \w+ sat under a \w+\.",
        r"Far away, a \w+ slept behind a \w+\.",
        r"\w+ felt \w+\.|\w+ \w+ \w+ly\.|\w+ wanted to \w+\.|\w+ dreamed about the \w+\.",
        r"\w+ liked to talk about the \w+\.|\w+ sang a song about a \w+ \w+\.",
    ]

    def locate(self, item):
        """(hops, place, holder, hops to the holder); ``passed`` then has the entities on the
        way."""
        hops, holder, to_holder, self.passed = 1, None, None, []
        if item in self.inside:
            item, hops = self.inside[item], 2
            self.passed.append(item)
        if item in self.holder:
            holder, to_holder = self.holder[item], hops
            item, hops = holder, hops + 1
            self.passed.append(item)
        return hops, self.place.get(item), holder, to_holder

    def answer(self, question, sentence):
        said = re.fullmatch(r"(.*) ([a-zA-Z]+)\.", sentence)
        start, value = said.groups()
        if match := re.fullmatch(r"Where is (the )?(\w+)\?", question):
            the, entity = match.groups()
            hops, place, _, _ = self.locate(entity)
            short = f"{'The ' if the else ''}{entity} is in the"
            assert start == short or the and start == f"The {entity} is still there in the"
            self.bridges.append(self.passed)
            kind, derived = f"where{hops}", place
        elif match := re.fullmatch(r"Who has the (\w+)\?", question):
            assert start in (f"The {match[1]} is still there with", f"The {match[1]} is with")
            _, _, derived, hops = self.locate(match[1])
            kind = "who" if hops == 1 else "who2"
            self.bridges.append(self.passed[:-1])
        elif match := re.fullmatch(r"What colour is the thing that (\w+) has\?", question):
            long = f"The thing of {match[1]} has the colour"
            assert start in (long, f"The thing that {match[1]} has is")
            (thing,) = [t for t, who in self.holder.items() if who == match[1] and t in THINGS]
            kind, derived = "colour2", self.colour[thing]
            self.bridges.append([thing])
        elif match := re.fullmatch(r"What is the (\w+) in\?", question):
            assert start == f"The {match[1]} was put down in the"
            kind, derived = "inside", self.inside[match[1]]
        elif match := re.fullmatch(r"What colour is the (\w+)\?", question):
            assert start in (f"The {match[1]} has the colour", f"The {match[1]} is")
            kind, derived = "colour", self.colour[match[1]]
        else:
            match = re.fullmatch(r"How many (\w+)s does (\w+) have\?", question)
            assert start == f"The number of {match[1]}s that {match[2]} has is"
            food, number = self.food[match[2]]
            assert food == match[1] and 0 <= number <= 9
            kind, derived = "count", NUMBERS[number]
        assert self.asked.get(question) != derived, f"asked again, although unchanged: {question}"
        self.asked[question] = derived
        self.check_answer(kind, derived, value)
