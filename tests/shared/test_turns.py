"""Threads that use one model with a store take turns."""

import copy
import os
import random
import sys
import threading

import numpy as np
import pytest

from minitx.decode import Autoregressive
from minitx.shared.turns import Turns
from minitx.skip.prefix_cache import Block, PrefixStore
from minitx.skip.semantic_cache import SemanticCache, SemanticStore


def prefixes(n: int) -> None:
    """Blocks of a kilobyte for eight prefixes of up to ten blocks, in a store for twenty."""
    draw = random.Random(n)
    for _ in range(300):
        text, blocks = draw.randrange(8), draw.randint(1, 10)
        hashes = [b"%d %d" % (text, i) for i in range(blocks)]
        found = PREFIXES.find(hashes)
        PREFIXES.put(hashes, lambda i: Block((), 1000))
        assert len(found) <= blocks


def answers(n: int) -> None:
    """Answers to sixteen prompts, in a store for three."""
    draw = random.Random(n)
    for _ in range(150):
        e = np.eye(16)[draw.randrange(16)]
        if ANSWERS.look_up(e, b"") is None:
            ANSWERS.note(e, b"", None, [1])


PREFIXES = PrefixStore(0.02)
ANSWERS = SemanticCache(Autoregressive(), SemanticStore(3), 1.0, 20)


@pytest.mark.parametrize("work", [prefixes, answers])
def test_threads_do_not_get_in_each_others_way(work):
    """An entry may be evicted while another thread looks it up."""
    wrong: list = []

    def run(n: int) -> None:
        try:
            work(n)
        except Exception as error:
            wrong.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong, "threads got in each other's way"
    assert PREFIXES.held <= PREFIXES.limit and len(ANSWERS.store.answers) <= 3


def test_copy_and_forked_process_have_their_own_turns():
    turns = Turns()
    with turns, turns:  # again by the same thread
        with copy.deepcopy(turns):
            assert list(turns.locks) == [os.getpid()]
        turns.locks[-1] = turns.locks.pop(os.getpid())  # as after a fork
        with turns:
            pass
        turns.locks[os.getpid()] = turns.locks.pop(-1)
