"""The answer cache in its plainest form: a list of (request, answer), searched from its end.

Requests are compared as they are, without a hash. Independent of minitx's code."""


class Answers:
    """room: how many tokens all answers may have together; ``overhead`` more for each answer. The
    list is in the order of use."""

    def __init__(self, room, overhead=0):
        self.room, self.overhead = room, overhead
        self.kept = []

    def find(self, request):
        for i, (known, answer) in enumerate(self.kept):
            if known == request:
                self.kept.append(self.kept.pop(i))  # used last
                return answer
        return None

    def put(self, request, answer):
        if len(answer) + self.overhead > self.room:
            return
        self.kept = [pair for pair in self.kept if pair[0] != request]
        self.kept.append((request, answer))
        while sum(len(tokens) + self.overhead for _, tokens in self.kept) > self.room:
            self.kept.pop(0)  # used longest ago


def normalized(text):
    """Lower case, and one space for each run of blanks, for ASCII letters."""
    words, word = [], ""
    for letter in text + " ":
        if letter in " \t\n\r\f\v":
            words += [word] if word else []
            word = ""
        else:
            word += chr(ord(letter) + 32) if "A" <= letter <= "Z" else letter
    return " ".join(words)
