"""``minitx frontier``: all techniques of a family beside each other, on equal terms.

    minitx frontier structure --share 0.75
    minitx frontier attention --methods elsa,random

    from minitx.lab.frontier import frontier
    print(frontier(minitx.load("stories"), "structure", shares=(0.75,)))

families.py lists the families, knobs.py says how a method is tuned. Most families are compared at
the same executed share of multiply-adds (equal_work.py, work_report.py); attention at the same
share of keys (attention.py and the other files of that name); ways to decode on the same prompts
(decoding.py and the other files of that name).
"""

from minitx.lab.frontier.families import family_of


def frontier(dense, family: str = "structure", bar: bool = True, **plan):
    """The comparison of a family on an LM without techniques. Options: the fields of ``Plan``
    (equal_work.py), of ``Grid`` (attention.py) for ``attention``, or of ``Plan`` (decoding.py) for
    ``decoding``."""
    return family_of(family).compare(dense, bar, **plan)
