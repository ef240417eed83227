"""``minitx report``: every technique on one model, as one self-contained HTML page.

    minitx report --quick                          # report.html, and report.json beside it
    minitx report -m my-model --text notes.txt     # any model, any text
    minitx report --from report.json --svg a.svg   # draw again, without measuring

measure.py measures what is missing and keeps every result at once in the JSON file (results.py), so
a run that was interrupted goes on where it stopped. points.py makes points (cost, loss) of the
results and draws the Pareto charts; page.py writes the page, summary.py what the terminal shows.
"""

from minitx.lab.report.measure import Plan, measure
from minitx.lab.report.results import Results, read_results

__all__ = ["Plan", "Results", "measure", "read_results"]
