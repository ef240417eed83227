"""k-means (Lloyd's method): a few points that stand for many, for several sets of them at once."""

import numpy as np

ROUNDS = 10  # in which points change sides; more move the centres little


def kmeans(points, count: int, seed: int):
    """Centres (C, count, V) of C sets of points (C, n, V), each set by itself, in float64.

    The first centres are points, each drawn with a chance that grows with its squared distance from
    those before (k-means++), so no two are equal while there are different ones. Then every centre
    moves to the mean of the points nearest to it; one that has none stays where it is. A set of no
    more than ``count`` different points is met by its centres but for rounding.
    """
    points = np.asarray(points, np.float64)
    centres = first_centres(points, count, np.random.default_rng(seed))
    for _ in range(ROUNDS):
        mine = nearest(points, centres)[:, None, :] == np.arange(count)[:, None]  # (C, count, n)
        mine = mine.astype(np.float64)
        mass = mine.sum(-1, keepdims=True)
        means = mine @ points / np.maximum(mass, 1)
        centres = np.where(mass > 0, means, centres)
    return centres


def first_centres(points, count: int, rng):
    """``count`` points of each set (C, n, V) -> (C, count, V)."""
    sets = np.arange(len(points))
    chosen = [points[sets, rng.integers(0, points.shape[1], len(points))]]
    far = None  # squared distance of each point from the nearest that is chosen
    while len(chosen) < count:
        from_last = ((points - chosen[-1][:, None]) ** 2).sum(-1)  # (C, n)
        far = from_last if far is None else np.minimum(far, from_last)
        below = far.cumsum(-1)
        drawn = rng.random(len(points)) * below[:, -1]
        chosen.append(points[sets, (below > drawn[:, None]).argmax(-1)])
    return np.stack(chosen, 1)


def nearest(points, centres):
    """Which of the centres (C, count, V) is nearest to each of the points (C, n, V): (C, n)."""
    near = points @ centres.swapaxes(-1, -2) - (centres**2).sum(-1)[:, None] / 2
    return near.argmax(-1)
