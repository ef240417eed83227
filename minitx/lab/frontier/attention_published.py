"""Published trade-offs between keys kept and quality, on the papers' own models and tasks.

Only their shape compares with ours: the models are encoders or memory networks, the tasks are
different, and so is what counts as kept.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One curve of a paper; without numbers if none is public."""

    technique: str
    what: str  # model, task, settings
    kept: tuple[float, ...]  # share of keys
    change: tuple[float, ...]  # of the task's metric, against the exact model's
    source: str


PUBLISHED = (
    Published(
        "a3",
        "BERT-base, SQuAD 1.1 (F1 .888); M = n, 3n/4, n/2, n/4, n/8",
        (0.25, 0.23, 0.21, 0.15, 0.09),
        (0.002, -0.004, 0.001, -0.009, -0.064),
        "Fig. 11",
    ),
    Published(
        "a3",
        "BERT-base, SQuAD 1.1 (F1 .888); T = 1, 2.5, 5, 10, 20 %",
        (0.13, 0.09, 0.07, 0.04, 0.02),
        (0.001, -0.001, -0.003, -0.021, -0.047),
        "Fig. 12",
    ),
    Published(
        "a3",
        "MemN2N, bAbI (accuracy .826); M = n, 3n/4, n/2, n/4, n/8",
        (0.61, 0.57, 0.49, 0.37, 0.27),
        (0.001, -0.001, -0.011, -0.046, -0.096),
        "Fig. 11",
    ),
    Published(
        "elsa",
        "12 pairs of model and task, our mean; p = .5, 1, 2, 4",
        (0.454, 0.360, 0.266, 0.191),
        (-0.003, -0.006, -0.013, -0.031),
        "Fig. 10",
    ),
    Published("dota", "accuracy, 80 % of attention saved", (0.2,), (-0.008,), "a third party"),
    Published("predictive_attention", "none public: only the abstract is", (), (), ""),
    Published("sparse_memory", "none about transformers", (), (), ""),
)
NOTES = (
    "Shares of a3 and elsa are bars read off their figures, to about .01. dota's row is Table II",
    "of SOFA (arXiv 2407.10416); that at most .2 of the keys are kept follows from its 80 %.",
)
