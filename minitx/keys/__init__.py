"""What the techniques share that tell which keys matter; ``choosing`` is where to begin.

``choosing`` is attention over the keys that a part has chosen, ``few_bits`` vectors as small whole
numbers. The others are each what one technique needs and an idea of its own: ``hashing`` (ELSA),
``sorted_columns``, ``greedy_search`` and ``fixed_point`` (A3), ``detector`` (DOTA), ``slots``,
``nearest`` and ``kd_trees`` (sparse memory).
"""
