"""Grade in the trainer's environment, and tell what was found.

    python grade_cases.py CASES.json OUT.json

CASES maps a name to `{reward, completions, params, columns}`; OUT maps it to the rewards. Further entries of OUT are
what the functions below, by their names, found of the pool of graders.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from posttrain_workloads.rewards import build
from posttrain_workloads.rewards.grading import GradingFailed, GradingPool, shared_pool

PATHOLOGICAL = (r"9^{9^{9}}", r"(10^{8})!", r"\sum_{k=1}^{10^9} \frac{1}{k^2}", "(" * 400 + "x" + ")" * 400)
HOLDER = """
import sys
from posttrain_workloads.rewards.grading import GradingPool
pool = GradingPool(1, cpu_seconds=60.0)
pool.grade("accuracy", ["1"], [r"\\boxed{1}"])
print("ready", flush=True)
pool.grade("accuracy", ["1"], [r"\\boxed{9^{9^{9}}}"])
sys.stdin.read()
"""


def main() -> None:
    cases, out = (Path(argument) for argument in sys.argv[1:])
    found: dict[str, Any] = {}
    for name, case in json.loads(cases.read_text()).items():
        count = len(case["completions"])
        reward = build(case["reward"], **case.get("params", {}))
        found[name] = reward(["p"] * count, case["completions"], [[]] * count, **case.get("columns", {}))
    found["imported"] = sorted({"torch", "transformers", "math_verify", "sympy"} & sys.modules.keys())
    for check in (
        threads,
        pathological,
        killed_worker,
        killed_server,
        killed_holder,
        forked,
        closed,
        shortcuts,
        plainly,
        numbers,
        differences,
        numeric_differences,
        deferred,
        parser_tables,
    ):
        found[check.__name__] = check()
    out.write_text(json.dumps(found))


def threads() -> list[list[bool | None]]:
    """What four threads were told that grade with one pool of two at the same time, each other things."""
    pool = GradingPool(2)
    told: list[list[bool | None]] = [[] for _ in range(4)]

    def grade(number: int) -> None:
        golds = [f"${number}$", "$7$"] * 3
        told[number] = pool.grade("accuracy", golds, [rf"\boxed{{{number}}}"] * 6)

    run_all([threading.Thread(target=grade, args=(number,)) for number in range(4)])
    pool.close()
    return told


def pathological() -> dict[str, list[bool | None]]:
    """Grades of answers that never end, with neighbours before and after, by one worker and by two."""
    told = {}
    for workers in (1, 2):
        pool = GradingPool(workers, cpu_seconds=0.3)
        answers = [r"\boxed{5}", *(rf"\boxed{{{answer}}}" for answer in PATHOLOGICAL), r"\boxed{5}", r"\boxed{6}"]
        told[str(workers)] = pool.grade("accuracy", ["$5$"] * len(answers), answers)
        pool.close()
    return told


def killed_worker() -> list[Any]:
    """What is said of an answer whose worker is killed, by somebody else, and what of those after it."""
    others = workers_below(os.getpid())
    pool = GradingPool(1, cpu_seconds=30.0)
    pool.grade("accuracy", ["1"], [r"\boxed{1}"])
    [(worker, _)] = workers_below(os.getpid()) - others
    failure: list[str] = []

    def grade() -> None:
        try:
            pool.grade("accuracy", ["0", "1"], [r"\boxed{2}", r"\boxed{9^{9^{9}}}"])
        except GradingFailed as error:
            failure.extend([str(error), str(error.index)])

    thread = threading.Thread(target=grade)
    used = cpu_ticks(worker)
    thread.start()
    wait(lambda: cpu_ticks(worker) > used + 20)  # it is at the second answer
    os.kill(worker, signal.SIGKILL)
    thread.join()
    after = pool.grade("accuracy", ["0", "1"], [r"\boxed{2}", r"\boxed{1}"])
    pool.close()
    return [*failure, after]


def killed_server() -> list[bool | None]:
    """Grades after the process that forks the workers was killed."""
    others = workers_below(os.getpid())
    pool = GradingPool(2)
    pool.grade("accuracy", ["1"], [r"\boxed{1}"])
    [(_, server)] = workers_below(os.getpid()) - others
    os.kill(server, signal.SIGKILL)
    grades = pool.grade("accuracy", ["2", "3"], [r"\boxed{2}", r"\boxed{2}"])
    pool.close()
    return grades


def killed_holder() -> list[int]:
    """The graders that are left of a process that was killed while they graded."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == b"ready\n"
    [processes] = workers_below(process.pid)
    used = cpu_ticks(processes[0])
    wait(lambda: cpu_ticks(processes[0]) > used + 20)  # it is at the answer that never ends
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    wait(lambda: not any(map(lives, processes)))
    return [pid for pid in processes if lives(pid)]


def forked() -> int:
    """The exit code of a fork that grades, after its parent did: 0 if it was told the truth."""
    shared_pool().grade("accuracy", ["1"], [r"\boxed{1}"])
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            pool = shared_pool()
            code = int(pool.grade("accuracy", ["4", "4"], [r"\boxed{4}", r"\boxed{5}"]) != [True, False])
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def closed() -> list[Any]:
    """Which processes are left of a pool that is closed, and what it then says."""
    others = workers_below(os.getpid())
    pool = GradingPool(1)
    pool.grade("accuracy", ["1"], [r"\boxed{1}"])
    [processes] = workers_below(os.getpid()) - others
    pool.close()
    try:
        pool.grade("accuracy", ["3"], [r"\boxed{1}"])
    except RuntimeError as error:
        return [[pid for pid in processes if lives(pid)], str(error)]
    return []


FRAGMENTS = (
    *("\n", "\n\n", " ", ", ", "and ", "or ; ", "$", "$$", r"\[", r"\]", r"\(", r"\)", "{", "}", "5", "x=3", "%"),
    *(r"\boxed{", r"\boxed{1}", r"\boxed{\frac{1}{3}}", r"\boxed {6}", r"\boxed 5", r"\fbox{7}", r"\fbox", r"\$"),
    *(r"$\boxed{9}$", r"$$\boxed{8}$$", r"\[ \boxed{4} \]", " [4] ", "$6$. I hope", "I hope", "final answer is\n"),
    *("The final answer is: ", "answer: ", "</think>", "we see that the longer text goes on for quite some time here "),
)


def shortcuts() -> dict[str, Any]:
    """Texts of which a part is said to decide, and those of them of which it does not."""
    sys.path.insert(0, str(Path(sys.modules["posttrain_workloads.rewards.grading"].__file__ or "").parent))
    from math_verify import parse

    from posttrain_workloads.rewards.grader import answer_config
    from posttrain_workloads.rewards.shortcut import deciding_part

    logging.disable()
    draw = random.Random(20)
    short, wrong = 0, []
    while short < 300:
        reasoning, answer, end = (draw.choices(FRAGMENTS, k=draw.randrange(most)) for most in (12, 6, 5))
        box = draw.choice([r"\boxed{3}", r"$\boxed{3}$", r"$$\boxed{3}$$", r"\[\boxed{3}\]"])
        text = "".join([*reasoning, "</think>", *answer, draw.choice(["\n", "\nso "]), box, *end])
        part = deciding_part(text)
        if part == text:
            continue
        short += 1
        for boxed in ("all", True):
            parsed = [repr(parse(one, answer_config(boxed), extraction_mode="first_match")) for one in (text, part)]
            if parsed[0] != parsed[1]:
                wrong.append([text, part, *parsed])
    return {"short": short, "wrong": wrong}


EQUALS = (
    ("7", "7.0", "007", r"\frac{14}{2}"),
    ("1000", "1,000", "10^3", r"10^{3}"),
    ("1", r"\sin^2(5) + \cos^2(5)", r"\sqrt{3 + 2\sqrt{2}} - \sqrt{2}"),
    ("-3", r"-\frac{9}{3}", "- 3"),
    (r"\frac{1}{2}", "0.5", r"\frac12", r"50\%", "1/2"),
    (r"\sqrt{8}", r"2\sqrt{2}", "2.828427"),
    (r"\frac{40\pi}{7}", r"\frac{40}{7} \cdot \pi"),
    (r"\frac{3+\sqrt{5}}{2}", r"\frac{3}{2} + \frac{\sqrt{5}}{2}"),
    ("(x+1)(x-1)", "x^2 - 1"),
    (r"2\sin^2(x)", r"1 - \cos(2x)"),
    (r"\{1, 2\}", "2, 1", r"\{2, 1, 1\}"),
    (r"y = 2x + \frac{1}{3}", "3y = 6x + 1"),
    ("[1, 2)", r"1 \le x < 2"),
    ("(1, 2)", r"\left(1, \frac{4}{2}\right)", r"\binom{1}{2}"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(3, \infty) \cup (-\infty, 2)"),
    (r"5 \text{ cm}", r"5\,\mathrm{cm}", "5"),
    (r"60^\circ", "60"),
    ("x = 3", "3"),
    (r"\binom{5}{2}", "10"),
    (r"\log_2 8", "3"),
    (r"\text{even}", "even"),
    ("e", "E", "e^1"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
    ("3i + 1", "1 + 3i"),
    (r"1 \pm \sqrt{2}", r"1 + \sqrt{2}, 1 - \sqrt{2}"),
    ("12:30", "{"),
)
"""Solutions, and how else they are written, if only nearly."""

FORMS = (
    *(
        r"\boxed{%s}",
        r"It is $\boxed{%s}$.",
        "\\[\n\\boxed{%s}\n\\]",
        r"**\boxed{%s}**",
        r"\boxed{%s",
        r"\fbox{%s}",
        "%s",
    ),
    *(r"$\boxed{%s}$ units", r"\boxed{%s}\%%", r"$x = \boxed{%s}$ and that is all {so} far", "$$%s$$"),
    *("answer: $%s$", "The final answer is $%s$. I hope", r"first $\boxed{1}$ and then $\boxed{%s}$"),
    r"\boxed{%s} or \boxed{2}",
)


def plainly() -> dict[str, Any]:
    """How many generated answers are right and wrong, and which a plain loop in this process grades otherwise."""
    from math_verify import parse, verify

    from posttrain_workloads.rewards.grader import answer_config

    draw = random.Random(30)
    golds, answers = [], []
    for _ in range(500):
        wanted, other = draw.choice(EQUALS), draw.choice(EQUALS)
        golds.append(f"${wanted[0]}$")
        answer = draw.choice(draw.choice([wanted, wanted, other])) + draw.choice(["", "", "", " + 1"])
        thought = draw.choice(["", "", r"Is it $\boxed{3}$?", r"</think>Let $x$ be \[ 4 \] "])
        answers.append(f"{thought}\n</think>\n{draw.choice(FORMS) % answer}")
    pool = GradingPool(2)
    graded = pool.grade("accuracy", golds, answers)
    pool.close()
    found: dict[str, Any] = {"right": graded.count(True), "wrong": graded.count(False), "different": []}
    for gold, answer, grade in zip(golds, answers, graded, strict=True):
        solution = parse(gold, extraction_mode="first_match")
        parsed = parse(answer, answer_config("all"), extraction_mode="first_match")
        plain = verify(solution, parsed)
        if grade != plain:
            found["different"].append([gold, answer, grade, plain])
    return found


def numbers() -> list[str]:
    """Whole numbers that are read otherwise than latex2sympy reads them."""
    from latex2sympy2_extended import latex2sympy2
    from sympy import srepr

    from posttrain_workloads.rewards.grader import QuickConverter

    draw = random.Random(40)
    texts = ["0", "00", "007", *("".join(draw.choices("0123456789", k=draw.randint(1, 40))) for _ in range(1000))]
    return [
        text for text in texts if srepr(QuickConverter().parse(text)) != srepr(latex2sympy2._Latex2Sympy().parse(text))
    ]


def draw_difference(draw: random.Random, terms: Sequence[str], *, errors: Sequence[str]) -> str:
    """Return the two sides of an identity, of these terms, as a difference; most of them with an error."""
    a, b, c = (draw.choice(terms) for _ in range(3))
    left, right = draw.choice(IDENTITIES)
    error = draw.choice(["", "", *errors])
    return f"({left}) - ({right}){error}".replace("A", f"({a})").replace("B", f"({b})").replace("C", f"({c})")


def differences() -> dict[str, Any]:
    """How many generated differences are zero and not, and which of them simplifying finds to be the other."""
    from sympy import simplify
    from sympy.parsing.sympy_parser import parse_expr

    from posttrain_workloads.rewards.grader import residue, simplify_unless_known

    draw = random.Random(50)
    found: dict[str, Any] = {"zero": 0, "not": 0, "known": 0, "different": []}
    for _ in range(400):
        text = draw_difference(draw, TERMS, errors=ERRORS)
        difference = parse_expr(text, evaluate=False)
        plainly, quickly = (is_zero(function, difference) for function in (simplify, simplify_unless_known))
        found["zero" if plainly else "not"] += 1
        found["known"] += residue(difference) not in (None, 0)
        if None not in (plainly, quickly) and plainly != quickly:
            found["different"].append(text)
    return found


def numeric_differences() -> dict[str, Any]:
    """How many generated numbers are zero and not, and which of them simplifying finds to be the other."""
    from sympy import simplify
    from sympy.parsing.sympy_parser import parse_expr

    from posttrain_workloads.rewards.grader import is_not_zero

    draw = random.Random(60)
    found: dict[str, Any] = {"zero": 0, "not": 0, "known": 0, "different": []}
    for _ in range(400):
        text = draw_difference(draw, NUMBERS, errors=(" + 1", " - 1/1000000", " + 10**(-30)", " - pi/3", " + I"))
        difference = parse_expr(text, evaluate=False)
        known, plainly = is_not_zero(difference), is_zero(simplify, difference)
        found["zero" if plainly else "not"] += 1
        found["known"] += known
        if known and plainly:
            found["different"].append(text)
    return found


def deferred() -> dict[str, Any]:
    """What a process that grades has imported of SymPy after it simplified and solved, and when more is asked for."""
    return told_by(
        """
import sympy
from posttrain_workloads.rewards import grader
grader.make_quick()
x = sympy.Symbol("x")
sympy.solve(sympy.Eq(3 * x, 1 + x**2), {x})
sympy.simplify(sympy.sin(x) ** 2 + sympy.cos(x) ** 2 + x)
names = (grader._UNITS, grader._TENSORS)
before = [type(sys.modules[name]).__name__ for name in names]
from sympy.physics.units import meter
from sympy.physics.units import Quantity
from sympy.tensor.tensor import TensorHead
from sympy.tensor.tensor import TensExpr
found = {
    "before": before,
    "after": [type(sys.modules[name]).__name__ for name in names],
    "units": [isinstance(meter, Quantity), sympy.simplify(x + meter).has(Quantity)],
    "tensors": [isinstance(TensorHead("A", [])(), TensExpr)],
}
"""
    )


def parser_tables() -> dict[str, Any]:
    """What becomes of the parser's tables from one process to the next."""
    make = """
from posttrain_workloads.rewards import grader, parser_tables
from latex2sympy2_extended.antlr_parser import PSParser
from pathlib import Path
grader.make_quick()
path = Path(FOLDER) / "tables"
parser_tables.tables_path = lambda: path
parsed = []
def parse(formula):
    parsed.append(bool(grader.parse_gold("accuracy", formula)))
    return parsed[-1]
"""
    use = """
parser_tables.use_tables(parse)
states = [state for dfa in PSParser.decisionsToDFA for state in dfa._states]
found = {
    "parsed": parsed,
    "states": len(states),
    "wrong hashes": sum(state.configs.hashConfigs() != hash(state.configs) for state in states),
    "names us": path.is_file() and b"posttrain" in path.read_bytes(),
    "files": sorted(each.name for each in path.parent.iterdir()) if path.parent.is_dir() else None,
}
for formula in parser_tables.FORMULAS:
    grader.parse_gold("accuracy", f"${formula}$")
found["more"] = sum(len(dfa._states) for dfa in PSParser.decisionsToDFA) - len(states)
"""
    with tempfile.TemporaryDirectory() as folder:
        make = make.replace("FOLDER", repr(folder))
        found = {name: told_by(make + use) for name in ("made", "used")}
        Path(folder, "tables").write_bytes(b"no tables")
        found["mended"] = told_by(make + use)
        Path(folder, "tables").unlink()
        Path(folder).rmdir()
        Path(folder).touch()
        found["not writable"] = told_by(make + use)
        Path(folder).unlink()
        Path(folder).mkdir()
    return found


def told_by(code: str) -> dict[str, Any]:
    """What a new process finds that runs this."""
    whole = f"import json, sys\n{code}\nprint(json.dumps(found))"
    output = subprocess.run([sys.executable, "-c", whole], stdout=subprocess.PIPE, text=True, check=True).stdout
    told: dict[str, Any] = json.loads(output.splitlines()[-1])
    return told


def is_zero(simplify: Callable[[Any], Any], difference: Any) -> bool | None:
    """Tell what math-verify finds of a difference; an error of SymPy is a wrong answer to it.

    None: SymPy, which draws the order of its questions, contradicts itself about `1 - 1`; the next time it does not.
    """
    from sympy.core.facts import InconsistentAssumptions

    try:
        return bool(simplify(difference).is_zero)
    except InconsistentAssumptions:
        return None
    except Exception:
        return False


NUMBERS = ("2", "1/7", "sqrt(2)", "sqrt(51) + 7", "1/(sqrt(7) - 2)", "pi", "E", "I", "2**(1/3)", "0", "1 - 1", "3**20")
TERMS = ("x", "y", "2*x", "x + 1", "3", "1/7", "x*y - 2", "x**2", "-y", "0", "sqrt(2)", "pi", "sin(x)", "0.5", "1 - 1")
IDENTITIES = (
    ("A*(B + C)", "A*B + A*C"),
    ("(A + B)**2", "A**2 + 2*A*B + B**2"),
    ("(A + B)*(A - B)", "A**2 - B**2"),
    ("(A**2 - B**2)/(A + B + 4)", "(A - B)*(A + B)/(A + B + 4)"),
    ("A/(C + 5) + B/(C + 5)", "(A + B)/(C + 5)"),
    ("(A + 7)**(-2)", "1/(A**2 + 14*A + 49)"),
    ("A + B", "B + C"),
    ("A/2305843009213693951", "A/2305843009213693951"),
)
"""Equal for all values of their terms, but the last but one. The last divides by the prime of grader.py."""

ERRORS = (" + 1", " - x", " + 1/1000000", " + 2305843009213693951", " + 2305843009213693951*x*y", " + 0")


# --- Processes --------------------------------------------------------------------------------------------------------


def workers_below(pid: int) -> set[tuple[int, int]]:
    """Return each process two below `pid`, with the one between."""
    return {(worker, server) for server in children(pid) for worker in children(server)}


def children(pid: int) -> list[int]:
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            found += map(int, (thread / "children").read_text().split())
    return found


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def cpu_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        threading.Event().wait(0.02)


def run_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
