"""Make a student's file from a master: the text, what is given, and holes instead of solutions."""

import ast
import re

from minitx.learn.answer import FOOTER
from minitx.learn.check import NOT_WRITTEN
from minitx.learn.exercise import Exercise

HOLE = f'raise NotImplementedError("{NOT_WRITTEN}")'


def student_file(exercise: Exercise) -> str:
    """The source of ``exNN_name.py`` as the student gets it."""
    parts = [f'"""{exercise.text}\n"""', "import numpy as np"]
    for kind, code in sections(exercise.source):
        if kind == "given" and code.startswith("import "):
            parts[1] = f"{code}\n\n{parts[1]}"  # Python's own modules come first
        else:
            parts.append(code if kind == "given" else with_holes(code))
    return "\n\n\n".join(parts).rstrip() + "\n\n" + FOOTER


def solution_text(exercise: Exercise) -> str:
    """The solution alone, as text."""
    return "\n\n\n".join(code for kind, code in sections(exercise.source) if kind == "solution")


def sections(source: str) -> list[tuple[str, str]]:
    """The marked sections of a master, in order: ("given" or "solution", code)."""
    pattern = r"^# (given|solution)\n(.*?)^# end of \1$"
    return [(kind, code.strip()) for kind, code in re.findall(pattern, source, re.M | re.S)]


def with_holes(code: str) -> str:
    """The code with every function's body, up to its docstring, replaced by a hole."""
    lines = code.splitlines()
    for f in reversed(functions(ast.parse(code))):
        first, *rest = f.body
        has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        begin = first.end_lineno if has_docstring else first.lineno - 1
        lines[begin : f.end_lineno] = [" " * f.body[0].col_offset + HOLE]
    return "\n".join(lines)


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    """The functions and methods, in the order of the text; none that is inside another one."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found.append(node)
        elif isinstance(node, ast.ClassDef):
            found += functions(node)
    return found
