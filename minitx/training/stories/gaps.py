"""How far apart the stories of two streams are, so that nobody has to search for them.

Only one story in twenty belongs to the calibration split, and one to the evaluation split: the
others are written to be rejected, which takes 10 ms for each story that is kept. So for the stories
that everybody reads, the first of grade full and seed 0, the number of random numbers that the
rejected ones before each took is noted here. To draw these without writing stories is 100 times as
fast.

    python -m minitx.training.stories.gaps    prints the table again, after the grammar has changed
"""

import random
import textwrap

from minitx.training.stories.generator import StoryGenerator
from minitx.training.stories.grades import grade_from

KNOWN = 256  # stories of each stream


def find_gaps(split: str, grade: str, seed: int, count: int) -> list[int]:
    """How many random numbers are drawn before the first story of a split, and between each of its
    first ``count`` stories and the next."""
    from minitx.training.stories import split_of

    uniform, drawn = random.Random(seed).random, 0

    def counted() -> float:
        nonlocal drawn
        drawn += 1
        return uniform()

    gaps, end = [], 0
    while len(gaps) < count:
        begin = drawn
        if split_of(StoryGenerator(grade_from(grade), counted).generate().text) == split:
            gaps.append(begin - end)
            end = drawn
    return gaps


def main() -> None:
    for stream in GAPS:
        numbers = ", ".join(map(str, find_gaps(*stream, KNOWN)))
        print(f"    {stream}: (\n{textwrap.indent(textwrap.fill(numbers, 84), ' ' * 8)},\n    ),")


# (split, grade, seed): the gaps, in order
# fmt: off
GAPS: dict[tuple, tuple[int, ...]] = {
    ("calibration", "full", 0): (
        284, 0, 1081, 7544, 2434, 70, 1230, 504, 233, 2286, 7590, 1293, 594, 4774, 2318,
        4375, 3026, 0, 3782, 3638, 2949, 96, 206, 2673, 2125, 648, 219, 1333, 4573, 4433,
        397, 1467, 0, 899, 3551, 2182, 2156, 107, 1346, 675, 3358, 2891, 726, 1603, 5217,
        463, 3571, 550, 1744, 95, 1949, 1935, 687, 128, 480, 1913, 1122, 892, 1648, 4255,
        1154, 0, 1654, 367, 3054, 2416, 264, 854, 1132, 644, 511, 360, 662, 1577, 908, 3484,
        727, 1523, 106, 3000, 1567, 1274, 365, 678, 3564, 1383, 120, 1082, 240, 424, 0,
        1350, 0, 544, 2193, 3546, 216, 763, 2067, 1655, 88, 477, 1763, 3351, 2408, 1393,
        871, 538, 3723, 2092, 104, 196, 2302, 733, 1915, 0, 6249, 1169, 4149, 3397, 184,
        640, 98, 225, 943, 2478, 340, 1334, 2684, 561, 902, 1387, 815, 3125, 1762, 3276,
        400, 3877, 579, 1070, 1590, 6395, 608, 521, 5387, 527, 407, 3146, 3217, 102, 2010,
        628, 56, 485, 303, 2401, 1313, 731, 1494, 2941, 1585, 258, 1561, 1530, 352, 781,
        2978, 255, 7817, 3051, 3351, 1514, 382, 1901, 0, 3652, 1543, 2458, 235, 1106, 0,
        4699, 0, 1738, 6566, 137, 1957, 2193, 2138, 988, 4227, 1741, 1082, 1471, 725, 1703,
        2071, 3704, 6680, 1481, 1500, 809, 3823, 423, 62, 0, 1036, 2090, 939, 388, 225,
        2178, 2815, 2878, 567, 9044, 2500, 2311, 294, 1215, 1173, 982, 1431, 940, 959, 585,
        545, 853, 0, 1626, 4846, 1033, 2528, 5324, 180, 1307, 3325, 3613, 855, 4934, 5307,
        214, 1776, 2168, 1183, 2830, 5621, 362, 1161, 1125, 1534, 507, 2233, 1984, 1201,
        2049,
    ),
    ("evaluation", "full", 0): (
        1654, 4582, 80, 753, 1162, 104, 9369, 1091, 208, 605, 4297, 722, 2511, 4041, 3261,
        2339, 3490, 1215, 281, 1594, 2741, 3310, 491, 1048, 0, 976, 122, 2221, 505, 1347,
        3516, 0, 1408, 843, 70, 529, 1693, 249, 1548, 3511, 621, 737, 631, 116, 1923, 2167,
        1281, 5875, 520, 3195, 288, 5416, 2542, 1124, 2977, 667, 458, 208, 6971, 2155, 2437,
        103, 1437, 2369, 724, 191, 546, 685, 874, 650, 577, 7272, 2166, 1644, 1183, 652,
        4040, 2342, 177, 321, 179, 0, 4110, 960, 6113, 598, 2170, 1129, 532, 801, 94, 584,
        8151, 952, 831, 1340, 402, 589, 2154, 669, 2380, 725, 2516, 662, 1329, 366, 3865,
        406, 595, 1463, 101, 155, 313, 1608, 280, 2328, 2157, 173, 4800, 671, 1952, 4152,
        38, 1585, 400, 3813, 2016, 70, 439, 10221, 1085, 3387, 92, 111, 2342, 5479, 4103,
        115, 109, 523, 2973, 1502, 6753, 5611, 1037, 60, 1093, 1585, 394, 7878, 2396, 0,
        558, 724, 101, 579, 142, 4151, 1933, 2867, 235, 2024, 800, 1159, 1415, 3583, 46,
        1134, 1523, 560, 520, 4742, 1367, 6529, 2925, 2645, 1145, 524, 215, 2927, 3061, 909,
        747, 612, 183, 1654, 1503, 2736, 3933, 2884, 3339, 777, 809, 1033, 5445, 2674, 5829,
        4931, 1297, 105, 463, 886, 1789, 2671, 2500, 916, 3823, 1268, 2405, 4219, 3772,
        3022, 2992, 1920, 992, 3383, 1183, 1793, 8729, 101, 0, 3492, 103, 171, 917, 1050,
        712, 399, 6798, 798, 4038, 851, 1441, 2738, 1789, 1885, 1857, 1624, 313, 586, 911,
        2595, 154, 3704, 1920, 932, 712, 2406, 3689, 0, 10696, 823, 1064, 59, 743, 2420,
    ),
}
# fmt: on

if __name__ == "__main__":
    main()
