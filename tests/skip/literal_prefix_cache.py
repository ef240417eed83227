"""The prefix cache in its plainest form: a dictionary from all tokens so far to a state.

Obviously right, and slow: after every token that is run, the whole state is copied.
"""


class Prefixes:
    """memory: (token, token, ...) -> the state after exactly these tokens."""

    def __init__(self, model):
        self.model = model
        self.memory = {}
        self.reused = []  # tokens of each prompt that were not run

    def generate(self, prompt, count):
        """Greedy tokens after the prompt."""
        text = list(prompt)
        state, position = self.begin(text)
        self.reused.append(position)
        logits = None
        while len(text) < len(prompt) + count:
            while position < len(text):
                logits = self.model(text[position : position + 1], state)[-1]
                position += 1
                self.memory[tuple(text[:position])] = state.fork(position)
            text.append(int(logits.argmax()))
        return text[len(prompt) :]

    def begin(self, text):
        """A copy of the state after the longest known prefix, and the length of that prefix. The
        last token is not looked up: it has to be run, since its logits are needed."""
        for m in range(len(text) - 1, 0, -1):
            if tuple(text[:m]) in self.memory:
                return self.memory[tuple(text[:m])].fork(m), m
        return self.model.new_state(), 0

    def known(self, text):
        """How many leading tokens were ever run as the beginning of a text, the last one too."""
        return max((m for m in range(len(text) + 1) if tuple(text[:m]) in self.memory), default=0)


class LeastRecentlyUsed:
    """LRU eviction as a table of times: the block used longest ago is evicted first; of the blocks
    of one prompt, which are used at the same time, the last one."""

    def __init__(self, room):
        self.room = room  # blocks
        self.time = 0
        self.table = {}  # block's name -> (when it was last used, minus its index in the prefix)

    def prompt(self, names):
        """Look up the full blocks of a prompt, which have these names, and store those that are
        missing. Returns how many leading blocks were found."""
        self.time += 1
        found = 0
        while found < len(names) and names[found] in self.table:
            found += 1
        for index in range(min(len(names), self.room)):
            if index < found:
                self.table[names[index]] = (self.time, -index)
        for index in range(found, min(len(names), self.room)):
            if len(self.table) == self.room:
                del self.table[min(self.table, key=self.table.get)]
            self.table[names[index]] = (self.time, -index)
        return found
