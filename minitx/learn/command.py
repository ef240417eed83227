"""``minitx learn``: its arguments, and what they do."""

import argparse
import json
import re
from pathlib import Path

from minitx.errors import MinitxError
from minitx.lab.layout import table

CHECK = "check"  # what `minitx learn 3` is short for


def add_learn(names, add) -> None:
    """Declare ``minitx learn`` and its subcommands. add: as in arguments.py."""
    learn = add(names, "learn", show_table, "exercises, checked by a program that names mistakes")
    learn.choice = "command of minitx learn"
    add_folder(learn, None)
    learn.add_argument("--json", action="store_true", help="print JSON")
    commands = learn.add_subparsers(metavar="COMMAND")

    text = "write the exercises into a folder of yours; what is there already stays"
    start = add(commands, "start", start_workbook, text)
    start.add_argument("folder", metavar="DIR", help="a new folder, or a workbook to complete")

    check = add(
        commands, CHECK, check_exercise, "check an exercise: minitx learn 3 is short for it"
    )
    add_exercise(check)
    add_folder(check)
    check.add_argument("--watch", action="store_true", help="check again whenever it is saved")

    hint = add(commands, "hint", give_hint, "a hint; ask again for a second one, which says more")
    add_exercise(hint)
    add_folder(hint)

    text = "our solution, once yours is right"
    solution = add(commands, "solution", show_solution, text)
    add_exercise(solution)
    add_folder(solution)
    text = "show it although the exercise is not solved; the table will say so"
    solution.add_argument("--give-up", action="store_true", help=text)

    text = "write the file of an exercise anew; your version is kept beside it"
    reset = add(commands, "reset", reset_exercise, text)
    add_exercise(reset)
    add_folder(reset)

    add_teacher(commands, add)


def add_teacher(commands, add) -> None:
    text = "for teachers: a folder with exercises to give to students, without solutions"
    handout = add(commands, "handout", make_handout, text)
    handout.add_argument("folder", metavar="DIR", help="a new folder")
    add_only(handout)

    text = "for teachers: check a class, one folder per student, with limits and other numbers"
    grade = add(commands, "grade", grade_class, text)
    grade.add_argument(
        "folder", metavar="SUBMISSIONS", help="the folder with the students' folders"
    )
    add_only(grade)
    grade.add_argument("--csv", metavar="FILE", help="also write a table for a spreadsheet")
    text = "also draw the class's Pareto chart of the open exercise (18)"
    grade.add_argument("--svg", metavar="FILE", help=text)
    grade.add_argument("--json", action="store_true", help="print JSON")
    text = "draws the numbers that answers are tried on (default 1; the student's own check has 0)"
    grade.add_argument("--seed", type=integer, default=1, metavar="N", help=text)
    text = "limit of each answer (default: that of the exercise, mostly 20)"
    grade.add_argument("--seconds", type=number, metavar="S", help=text)
    text = "memory limit of each answer (default 4096)"
    grade.add_argument("--megabytes", type=number, default=4096.0, metavar="MB", help=text)


def add_only(command) -> None:
    text = "some exercises, such as 1-6,12 (default: all)"
    command.add_argument("--only", metavar="NUMBERS", help=text)


def integer(word: str) -> int:
    if not 0 <= int(word) < 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {word}")
    return int(word)


def number(word: str) -> float:
    if not 0 < float(word) <= 1e6:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {word}")
    return float(word)


def add_folder(command, default=argparse.SUPPRESS) -> None:
    """--dir, before a subcommand or after it: without a default there, which would overwrite what
    stands before."""
    text = "the workbook (default: the current folder if it is one, or the last one used)"
    command.add_argument("--dir", metavar="DIR", default=default, help=text)


def add_exercise(command) -> None:
    command.add_argument("exercise", help="number or name of the exercise, such as 3")


def with_check(words: list[str]) -> list[str]:
    """``learn 3`` means ``learn check 3``; argparse would take 3 for a misspelled command."""
    if words[:1] == ["learn"]:
        for i, word in enumerate(words[1:], 1):
            if re.match(r"(ex)?\d", word) and words[i - 1] != "--dir":
                return [*words[:i], CHECK, *words[i:]] if only_options(words[1:i]) else words
    return words


def only_options(words: list[str]) -> bool:
    """Is there no command among the words yet?"""
    return all(w.startswith("-") or before == "--dir" for before, w in zip(["", *words], words))


# What they do ------------------------------------------------------------------------------------


def show_table(args) -> None:
    from minitx.learn.exercise import exercises
    from minitx.learn.workbook import Progress, find_workbook

    folder = find_workbook(args.dir, needed=bool(args.dir))
    progress = None if folder is None else Progress(folder)
    here = [e for e in exercises() if folder is None or (folder / f"{e.stem}.py").exists()]
    states = {e: "" if progress is None else progress.state(e) for e in here}
    if args.json:
        rows = [{"number": e.number, "name": e.stem, "title": e.title} for e in here]
        for row, e in zip(rows, here):
            row |= {"minutes": e.minutes, "difficulty": e.difficulty, "state": states[e]}
        print(json.dumps({"folder": folder and str(folder), "exercises": rows}, indent=1))
        return
    done = [e for e, state in states.items() if state == "solved"]
    upcoming = next((e for e, s in states.items() if s not in ("solved", "given up")), None)
    rows = [["exercise", "no.", "minutes", "difficulty", "state"]]
    for e, state in states.items():
        state = {"solved": "done"}.get(state, state)
        if e is upcoming:
            state = f"{state + ', ' if state else ''}next"
        rows.append([e.title, str(e.number), str(e.minutes), e.difficulty, state])
    print(table(rows))
    if folder is None:
        print("\nMake a workbook, the folder that you work in, with: minitx learn start exercises")
        return
    print(f"\n{len(done)} of {len(states)} done, in {folder}.")
    if upcoming is not None:
        print(
            f"Next: open {folder / upcoming.stem}.py, fill in the hole, and run: minitx learn "
            f"{upcoming.number}"
        )


def start_workbook(args) -> None:
    from minitx.learn.workbook import start

    if not args.folder:
        raise MinitxError("The name of the folder is empty; give the name of a new folder.")
    new = start(args.folder)
    exercises = [path for path in new if path.name.startswith("ex")]
    if not exercises:
        print(f"{args.folder} has all exercises already; minitx learn shows the progress.")
        return
    print(f"{len(exercises)} exercises written to {args.folder}.")
    print(f"Open {exercises[0]}, fill in the hole, and run: minitx learn 1")


def located(args):
    """(the workbook, the exercise) that the arguments name."""
    from minitx.learn.exercise import find_exercise
    from minitx.learn.workbook import find_workbook, remember

    exercise = find_exercise(args.exercise)
    folder = find_workbook(args.dir)
    if folder != Path.cwd():
        remember(folder)
    return folder, exercise


def check_exercise(args) -> int:
    from minitx.learn.session import check, watch

    folder, exercise = located(args)
    return 0 if (watch if args.watch else check)(folder, exercise) else 1


def give_hint(args) -> None:
    from minitx.learn.session import hint

    print(hint(*located(args)))


def show_solution(args) -> None:
    from minitx.learn.session import solution

    print(solution(*located(args), args.give_up))


def reset_exercise(args) -> None:
    from minitx.learn.workbook import reset

    folder, exercise = located(args)
    kept = reset(folder, exercise)
    print(f"{exercise.stem}.py is new" + (f"; your version is {kept.name}." if kept else "."))


# Teachers ----------------------------------------------------------------------------------------


def make_handout(args) -> None:
    from minitx.learn.handout import chosen_exercises, hand_out

    chosen = chosen_exercises(args.only)
    hand_out(args.folder, chosen)
    count = "1 exercise" if len(chosen) == 1 else f"{len(chosen)} exercises"
    print(f"{args.folder}: {count} and a README.md for students, no solutions.")


def grade_class(args) -> None:
    from minitx.checkpoints.common import need_writable_file
    from minitx.learn.grade import grade
    from minitx.learn.handout import chosen_exercises
    from minitx.pictures.output import check_output, write_picture

    chosen = chosen_exercises(args.only)
    if args.csv is not None:
        need_writable_file(Path(args.csv))  # now, not after half an hour
    if args.svg is not None:
        check_output(args.svg, ".svg")
    found = grade(args.folder, chosen, args.seed, args.seconds, args.megabytes)
    if args.csv is not None:
        found.write_csv(args.csv)
    if args.svg is not None:
        write_picture(found.chart(), args.svg)
    print(json.dumps(found.as_dict(), indent=1) if args.json else found)
