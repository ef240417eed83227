"""The exercises: ``minitx learn``. Each master (``ex03_attention.py``) states a problem, solves it,
and knows the typical mistakes. exercise.py says what a master consists of, check.py judges an
answer, workbook.py writes the files that a student works in.
"""


def check_file(path) -> bool:
    """Check the exercise in a student's file, print the verdict, and return whether it passed:
    what ``python ex03_attention.py`` runs. What is no exercise ends in one sentence."""
    from minitx.errors import MinitxError
    from minitx.learn.session import check_here  # imported late: masters import this package

    try:
        return check_here(path)
    except MinitxError as error:
        raise SystemExit(f"minitx: {error}") from None
