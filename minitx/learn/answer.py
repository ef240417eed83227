"""Read a student's file: run it as a module, and look at what it imports."""

import ast
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

from minitx.checkpoints.common import read
from minitx.errors import MinitxError, abbreviate
from minitx.learn.check import changes_library, verdict_on_error
from minitx.learn.exercise import Exercise
from minitx.learn.libraries import contents, restore
from minitx.learn.verdict import Verdict

MAX_BYTES = 2**20  # of a file that someone wrote by hand


def read_answer(exercise: Exercise, path) -> tuple[SimpleNamespace | None, Verdict | None]:
    """(what the file defines, None), or (None, a verdict that says why it cannot be used)."""
    source, trouble = read_source(path)
    if trouble is not None:
        return None, trouble
    try:
        code = compile(source, str(path), "exec")
    except (SyntaxError, ValueError) as error:  # ValueError: a NUL byte in older versions
        line = f" in line {error.lineno}" if getattr(error, "lineno", None) else ""
        what = abbreviate(getattr(error, "msg", None) or str(error))[1:-1]
        return None, Verdict("error", f"Python cannot read {Path(path).name}: {what}{line}.")
    module, before = ModuleType(exercise.stem), contents()
    module.__file__ = str(path)
    sys.modules[exercise.stem] = module  # where dataclasses look for the names in it
    try:
        exec(code, vars(module))
    except KeyboardInterrupt:  # Ctrl-C
        raise
    except BaseException as error:
        restore(before)
        return None, verdict_on_error(error)
    if changed := restore(before):
        return None, changes_library(changed)
    missing = [name for name in exercise.names if not callable(vars(module).get(name))]
    if missing:
        message = f"There is no {missing[0]} in {Path(path).name}; it must have that name."
        return None, Verdict("error", message)
    return SimpleNamespace(**{name: vars(module)[name] for name in exercise.names}), None


def read_source(path) -> tuple[str, Verdict | None]:
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            return "", Verdict("error", f"{path.name} has more than {MAX_BYTES:,} bytes.")
        if not path.is_file():
            return "", Verdict("error", f"{path.name} is not a file.")
        return read(path, MAX_BYTES).decode("utf-8-sig"), None
    except FileNotFoundError:
        return "", Verdict("error", f"There is no file {path.name}.")
    except UnicodeDecodeError:
        return "", Verdict("error", f"{path.name} is not UTF-8 text.")
    except OSError as error:
        return "", Verdict("error", f"{path.name} cannot be read ({error.strerror or error}).")
    except MinitxError as error:
        return "", Verdict("error", str(error))


def imports_minitx(source: str) -> bool:
    """Does the code import minitx, which contains the solutions? It is parsed, not executed. The
    last lines of each file, which call the checker, do not count."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    body = [node for node in tree.body if not calls_the_checker(node)]
    return any(names_minitx(node) for top in body for node in ast.walk(top))


def calls_the_checker(node: ast.AST) -> bool:
    """``if __name__ == "__main__":`` and nothing below it but the two lines of a fresh file."""
    return ast.dump(node) in (ast.dump(fresh) for fresh in ast.parse(FOOTER).body)


def names_minitx(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] == "minitx" for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] == "minitx"
    # importlib.import_module("minitx.ops"), __import__("minitx")
    return isinstance(node, ast.Constant) and str(node.value).split(".")[0] == "minitx"


FOOTER = """
if __name__ == "__main__":
    from minitx.learn import check_file

    check_file(__file__)
"""
