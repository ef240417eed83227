"""The results of a report, as a JSON file that is rewritten after each method.

    {"format": 1,
     "made_of": {"model": ..., "weights": ..., ...},    what was measured on what: the fingerprint
     "about": {"model": ..., "dense": {...}, ...},
     "work": {"defaults": {"elsa": [row, ...]}, "structure": {...}, "calculation": {...}},
     "others": {"attention": {...}, "decoding": {...}},  as their own --json prints them
     "refused": {"attention": "why there is none"}}

A row is a ``Row`` of frontier/equal_work.py. Results with another fingerprint are refused, not
mixed in.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from minitx.checkpoints.common import atomic_write, need_writable_file, read_json
from minitx.errors import MinitxError, abbreviate
from minitx.lab.frontier.equal_work import Row

FORMAT = 1
MOST_BYTES = 2**26


@dataclass
class Results:
    made_of: dict  # what was measured on what, and by which version
    about: dict
    work: dict[str, dict[str, list[Row]]] = field(default_factory=dict)  # by family and method
    others: dict[str, dict] = field(default_factory=dict)  # by family
    refused: dict[str, str] = field(default_factory=dict)  # by family
    path: Path | None = None  # of the JSON file, if it is kept

    def rows(self) -> list[tuple[str, Row]]:
        """(family, row) of all methods."""
        return [
            (family, row)
            for family, methods in self.work.items()
            for rows in methods.values()
            for row in rows
        ]

    def as_dict(self) -> dict:
        work = {
            family: {method: [row_as_dict(row) for row in rows] for method, rows in methods.items()}
            for family, methods in self.work.items()
        }
        return {
            "format": FORMAT,
            "made_of": self.made_of,
            "about": self.about,
            "work": work,
            "others": self.others,
            "refused": self.refused,
        }

    def keep(self) -> None:
        """Write the JSON file, whole or not at all."""
        if self.path is not None:
            with atomic_write(self.path) as file:
                file.write(json.dumps(self.as_dict(), indent=1).encode())


def row_as_dict(row: Row) -> dict:
    """Without what is empty, to keep the file small."""
    from dataclasses import asdict

    return {name: value for name, value in asdict(row).items() if value not in (None, "", ())}


def read_row(found: dict) -> Row:
    empty = {"share": None, "figures": None, "losses": None, "notes": ()}
    return Row.read(empty | found)


def read_results(path) -> Results:
    """The results in a JSON file; MinitxError if it holds none."""
    path = Path(path)
    found = read_json(path, MOST_BYTES)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise MinitxError(f"{path} holds no results of minitx report; give another file.")
    try:
        work = {
            family: {method: [read_row(row) for row in rows] for method, rows in methods.items()}
            for family, methods in found["work"].items()
        }
        whole = [dict(found[name]) for name in ("made_of", "about", "others", "refused")]
        made_of, about, others, refused = whole
        results = Results(made_of, about, work, others, refused, path)
        need_drawable(results)
    except MinitxError:
        raise
    except Exception as error:  # of any kind: any value may be of another kind than expected
        raise MinitxError(
            f"{path} is damaged ({type(error).__name__}: {abbreviate(str(error))}); measure again "
            "with --restart."
        ) from None
    return results


def need_drawable(results: Results) -> None:
    """Draw all that is drawn of results. Some exception if a value in the file is of the wrong
    kind: better now than after another hour of measuring."""
    from minitx.lab.report.page import html
    from minitx.lab.report.points import points_of
    from minitx.lab.report.summary import summary

    html(results)
    summary(points_of(results), results.about)


def started(path: Path | None, made_of: dict, about: dict, restart: bool) -> Results:
    """The results so far in the file; new ones if there is none. MinitxError if the file holds
    results of something else."""
    if path is None or restart or not path.exists():
        if path is not None:
            need_writable_file(path)
        return Results(made_of, about, path=path)
    found = read_results(path)
    need_writable_file(path)
    made_of = json.loads(json.dumps(made_of))  # tuples become lists
    differing = [name for name in made_of if found.made_of.get(name) != made_of[name]]
    if differing:
        before, now = (abbreviate(d.get(differing[0])) for d in (found.made_of, made_of))
        raise MinitxError(
            f"{path} holds results with another {differing[0]} ({before}, now {now}), which cannot "
            "be mixed: give another --out, or --restart to measure all of it again."
        )
    return found
