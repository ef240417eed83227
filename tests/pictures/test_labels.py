"""Labels beside points: however many there are, none covers another, a point or the frame."""

from itertools import combinations

import numpy as np
import pytest

from minitx.pictures.labels import LIST_GAP, Box, beside, place

FRAME = Box(50, 50, 450, 350)


def random_points(rng, n: int):
    """Half of them in a small corner, where there is no room for all labels."""
    near = n // 2
    x = np.concatenate([rng.uniform(60, 110, near), rng.uniform(50, 450, n - near)])
    y = np.concatenate([rng.uniform(300, 350, near), rng.uniform(50, 350, n - near)])
    return list(zip(x.tolist(), y.tolist()))


@pytest.mark.parametrize("n", [1, 12, 60, 150])
def test_labels_of_random_points_never_overlap(n):
    points = random_points(np.random.default_rng(n), n)
    wanted = [(x, y, "x" * (1 + i % 17)) for i, (x, y) in enumerate(points)]
    labels = place(wanted, points, FRAME, radius=4)
    assert sorted(label.text for label in labels) == sorted(text for *_, text in wanted)
    for a, b in combinations(labels, 2):
        assert not a.box.meets(b.box), f"{a} and {b} overlap"
    for label in labels:
        if label.listed:
            assert label.box.left >= FRAME.right + LIST_GAP, "the list is beside the frame"
            assert FRAME.top <= label.box.top and label.box.bottom <= FRAME.bottom + 1e-6
            continue
        assert label.box.within(FRAME), f"{label} leaves the frame"
        for x, y in points:
            assert not label.box.meets(Box(x - 4, y - 4, x + 4, y + 4)), f"{label} covers a point"


def test_label_without_room_goes_to_the_list_with_a_line_to_its_point():
    points = [(250, 200)] * 60
    labels = place([(*p, f"point {i}") for i, p in enumerate(points)], points, FRAME)
    listed = [label for label in labels if label.listed]
    assert listed and not labels[0].listed, "the first finds a place beside its point"
    assert all(label.leader[0] == (250, 200) for label in listed)
    assert labels[0].leader == [], "a label close to its point needs no line"


def test_list_is_in_the_order_of_the_points_and_continues_in_another_column():
    wanted = [(100, y, f"{y}") for y in range(349, 51, -7)]
    labels = beside(wanted, FRAME, size=12)
    assert [label.text for label in labels] == [f"{y}" for y in range(55, 350, 7)]
    assert len({label.box.left for label in labels}) == 3  # 43 labels, 20 to a column
