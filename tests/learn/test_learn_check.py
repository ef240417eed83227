"""What the checker says about answers that no master foresees: as a student, one would like to know
where and how it is wrong. The answers here are written independently of the flawed versions."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from minitx.learn.check import judge
from minitx.learn.exercise import Mistake, find_exercise
from minitx.learn.in_model import demonstration

NORM, ATTENTION = find_exercise(1), find_exercise(3)


def verdict_on(rms_norm):
    return judge(NORM, SimpleNamespace(rms_norm=rms_norm))


def right(x, gain, eps):
    return np.array([row / (np.dot(row, row) / len(row) + eps) ** 0.5 * gain for row in x])


def test_right_answer_of_another_style_passes():
    assert verdict_on(right).passed


def test_answer_as_lists_of_numbers_passes():
    assert verdict_on(lambda x, gain, eps: right(x, gain, eps).tolist()).passed


def test_answer_as_tuples_of_numbers_passes():
    assert verdict_on(lambda x, gain, eps: tuple(map(tuple, right(x, gain, eps)))).passed


def test_two_results_of_one_shape_in_a_list_are_two_results():
    greedy = find_exercise(15)
    answer = SimpleNamespace(greedy=lambda *case: list(greedy.solution.greedy(*case)))
    assert judge(greedy, answer).passed, "sums and kept are not the rows of one array"


def raise_base(x, gain, eps):
    raise BaseException("boo")


def endless(x, gain, eps):
    rows = []
    rows.append(rows)
    return rows


async def later(x, gain, eps):
    return x


class Unprintable(Exception):
    def __str__(self):
        raise ValueError


def raise_unprintable(x, gain, eps):
    raise Unprintable


@pytest.mark.parametrize(
    "wrong, kind, said",
    [
        (lambda x, gain, eps: 3 * right(x, gain, eps), "wrong", "factor 3"),
        (lambda x, gain, eps: -right(x, gain, eps), "wrong", "sign"),
        (lambda x, gain, eps: right(x, gain, eps)[:, 1:], "form", "shape"),
        (lambda x, gain, eps: right(x, gain, eps)[0], "form", "shape"),
        (lambda x, gain, eps: right(x, gain, eps).astype(np.float32), "form", "float32"),
        (lambda x, gain, eps: None, "form", "return missing"),
        (lambda x, gain, eps: right(x, gain, eps) * np.nan, "form", "nan"),
        (lambda x, gain, eps: "done", "wrong", "'done'"),
        (lambda x, gain, eps: right(x, gain, eps) > 0, "form", "numbers"),
        (lambda x, gain, eps: x.tolist() + [[1, "a"]], "form", "Expected"),
        (lambda x, gain: x, "error", "TypeError"),
        (lambda x, gain, eps: x[:, 99], "error", "IndexError"),
        (lambda x, gain, eps: exit(3), "error", "SystemExit"),
        (lambda x, gain, eps: np.zeros(10**15), "limit", "memory"),
        (lambda x, gain, eps: (right(x, gain, eps),), "form", "Expected"),
        (lambda x, gain, eps: (row for row in x), "wrong", "generator"),
        (later, "wrong", "async def"),
        (endless, "form", "contain itself"),
        (raise_base, "error", "boo"),
        (raise_unprintable, "error", "Unprintable"),
    ],
)
def test_wrong_answer_without_a_name_is_described(wrong, kind, said):
    verdict = verdict_on(wrong)
    assert (verdict.kind, said.lower() in verdict.message.lower()) == (kind, True), verdict


def test_replaced_library_function_is_reported_and_undone(monkeypatch):
    absolute = np.abs
    monkeypatch.setattr(np, "abs", absolute)  # undone even if this test fails

    def replaces(x, gain, eps):
        np.abs = lambda x: np.zeros(np.shape(x))  # and every difference is 0
        return 2 * x

    verdict = verdict_on(replaces)
    assert (verdict.kind, "numpy.abs" in verdict.message) == ("error", True), verdict
    assert np.abs is absolute, "the next answer would be judged with it"


def test_message_names_the_arguments_and_the_part_that_is_wrong():
    said = verdict_on(lambda x, gain, eps: 3 * right(x, gain, eps)).message
    assert "x (4, 4), gain = [" in said and "eps = 0.1" in said
    cost = SimpleNamespace(multiply_adds=lambda config, T, S: 7, cache_bytes=lambda config, S: 7)
    said = judge(find_exercise(6), cost).message
    assert "in multiply_adds" in said and "T = " in said


def test_error_of_numpy_is_told_to_its_end():
    said = verdict_on(lambda x, gain, eps: x + np.zeros((2, 7))).message
    assert "(4,4) (2,7)" in said


def test_changed_input_is_reported():
    def changes(x, gain, eps):
        x *= 2
        return right(x / 2, gain, eps)

    verdict = verdict_on(changes)
    assert verdict.kind == "form" and "changes its first argument in place" in verdict.message


def test_error_names_the_line_of_the_student(tmp_path):
    from minitx.learn.answer import read_answer

    path = tmp_path / "ex01_rms_norm.py"
    path.write_text("def rms_norm(x, gain, eps):\n    y = x / 2\n    return y + undefined\n")
    answer, trouble = read_answer(NORM, path)
    assert trouble is None
    assert "NameError" in judge(NORM, answer).message
    assert "in line 3: return y + undefined" in judge(NORM, answer).message


@pytest.mark.parametrize(
    "source, said",
    [
        ("def rms_norm(:\n", "Python cannot read ex01_rms_norm.py"),
        ("x = 1\n", "There is no rms_norm in"),
        ("rms_norm = 3\n", "There is no rms_norm in"),
        ("import nothing_of_this_name\n", "ModuleNotFoundError"),
        ("import sys\nsys.exit(0)\n", "SystemExit"),
        ("a = '\0'\n", "Python cannot read"),
        ("#" * 2**21, "more than"),
        (b"# \xff\n", "not UTF-8"),
    ],
)
def test_file_that_cannot_be_used_says_why(source, said, tmp_path):
    from minitx.learn.answer import read_answer

    path = tmp_path / "ex01_rms_norm.py"
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    answer, trouble = read_answer(NORM, path)
    assert answer is None and trouble.kind == "error" and said in trouble.message, trouble


def test_two_mistakes_written_by_a_student_are_both_named():
    def attention(q, k, v):  # no scale, and the groups of heads in a cycle
        H, T, _ = q.shape
        K, S, n = v.shape
        out = np.zeros((H, T, n))
        for h in range(H):
            for t in range(T):
                end = S - T + t + 1
                scores = k[h % K, :end] @ q[h, t]
                e = np.exp(scores - scores.max())
                out[h, t] = e / e.sum() @ v[h % K, :end]
        return out

    verdict = judge(ATTENTION, SimpleNamespace(attention=attention))
    assert verdict.message.startswith("Two mistakes.")
    assert "sqrt(d)" in verdict.message and "np.repeat" in verdict.message


def test_another_seed_draws_other_numbers():
    from minitx.learn.check import draw_cases

    first, second = draw_cases(NORM, 0)[0][0], draw_cases(NORM, 1)[0][0]
    assert first.shape == second.shape and not np.allclose(first, second)


@pytest.mark.parametrize(
    "source, found",
    [
        ("import numpy as np\n", False),
        ("import minitx\n", True),
        ("def f():\n    from minitx.ops import rms_norm\n", True),
        ("import importlib\nops = importlib.import_module('minitx.ops')\n", True),
        ("# import minitx\n", False),
        ("def broken(:\n", False),
        (
            'if __name__ == "__main__":\n    from minitx.learn import check_file\n\n'
            "    check_file(__file__)\n",
            False,
        ),
        ('if __name__ == "__main__":\n    import minitx.ops\n', True),
    ],
)
def test_imports_of_minitx_are_found_without_running_the_file(source, found):
    from minitx.learn.answer import imports_minitx

    assert imports_minitx(source) == found


def test_answer_that_is_wrong_in_a_single_case_is_wrong():
    seen = []

    def wrong_once(x, gain, eps):
        seen.append(x)
        return right(x, gain, eps) * (2 if len(seen) == 1 else 1)

    assert not verdict_on(wrong_once).passed, "a single wrong case passes"


def test_exception_everywhere_is_not_taken_for_a_mistake_that_raises_too():
    def flawed(x, gain, eps, *, broken=False):
        return x[:, 99] if broken else right(x, gain, eps)

    raising = replace(NORM, flawed=flawed, mistakes=(Mistake("It is broken.", broken=True),))
    verdict = judge(raising, SimpleNamespace(rms_norm=lambda x, gain, eps: x[99]))
    assert verdict.kind == "error" and "IndexError" in verdict.message


def test_answer_that_writes_another_text_in_the_model_is_told_so():
    wrong = SimpleNamespace(rms_norm=lambda x, gain, eps: 2 * right(x, gain, eps))
    assert "minitx's own code writes another text" in demonstration(NORM, wrong)
    same = SimpleNamespace(rms_norm=NORM.solution.rms_norm)
    assert "That is the text that minitx's own code writes." in demonstration(NORM, same)
