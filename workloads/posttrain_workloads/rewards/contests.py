"""Problems of contests: the rows of open-r1/codeforces and open-r1/ioi, and what a program scores on their tests.

It owns how a test of theirs is run and judged; the programs run in a sandbox, checkers in runs of their own, so that no
solution can reach the checker or the expected output.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from posttrain_workloads.rewards.execution import Execution, ExecutionError, Program
from posttrain_workloads.rewards.programs import RunPrograms, batches_of, same_output

TESTS_FOLDER_VARIABLE = "CF_TESTS_FOLDER"
"""Names the folder with the generated tests of open-r1/codeforces, as for open-r1."""

TESTS_MISSING = (
    "the row's tests are not complete without the generated ones of open-r1/codeforces: name the folder that holds "
    f"them in ${TESTS_FOLDER_VARIABLE}"
)

_MIB = 1 << 20
_LEAST_MEMORY_BYTES = 64 * _MIB
"""An interpreter's own; some problems of long ago allow less than that."""
_CHECKER_SECONDS = 30.0
_CODEFORCES_EXTRA_SECONDS, _IOI_EXTRA_SECONDS = 10.0, 3.0
"""On the clock beyond the problem's limit, which is one of CPU time: a busy sandbox is not the program's fault."""

# Runs the solution as a child, and writes what it left in output.txt when it has ended.
_PYTHON_FROM_FILE = """\
import subprocess, sys
code = subprocess.run([sys.executable, "solution.py"]).returncode
if code == 0:
    sys.stdout.write(open("output.txt").read())
sys.exit(code if code >= 0 else 1)
"""
_CPP_FROM_FILE = """\
#include <cstdio>
#include <cstdlib>
#include <sys/wait.h>
#include <unistd.h>
__attribute__((constructor)) static void print_the_output_file() {
    pid_t child = fork();
    if (child == 0) return;
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) < 0 || !WIFEXITED(status) || WEXITSTATUS(status) != 0) _exit(1);
    FILE *file = std::fopen("output.txt", "r");
    if (!file) _exit(1);
    for (int letter; (letter = std::fgetc(file)) != EOF;) std::putchar(letter);
    std::fflush(stdout);
    _exit(0);
}
"""


@dataclass(frozen=True)
class ContestTest:
    """One test."""

    input: str
    output: str


@dataclass(frozen=True)
class CodeforcesProblem:
    """A problem of Codeforces with its tests."""

    language: str
    tests: tuple[ContestTest, ...] | None
    """None: its generated tests are not at hand."""
    time_limit_seconds: float
    memory_limit_bytes: int
    from_file: bool
    """Its programs read input.txt and write output.txt."""
    checker: str | None
    """A Python program that is called with the input, the expected and the written output, and prints a score."""

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Self:
        """Return the problem in a row.

        Raises:
            ValueError: a column is missing, or the language is neither Python nor C++.
        """
        _need(row, "language", "official_tests", "time_limit", "memory_limit", "input_mode", reward="cf_code")
        language = str(row["language"]).lower()
        if language not in {"python", "cpp"}:
            raise ValueError(f"cf_code runs python and cpp, and a row has the language {language!r}")
        return cls(
            language=language,
            tests=_codeforces_tests(row),
            time_limit_seconds=float(row["time_limit"]),
            memory_limit_bytes=int(float(row["memory_limit"]) * _MIB),
            from_file=row["input_mode"] == "file",
            checker=row.get("generated_checker") or None,
        )

    def program(self, source: str, test: ContestTest) -> Program:
        """Return the program for a test."""
        files = [("main.py" if self.language == "python" else "main.cpp", source)]
        if self.from_file:
            if self.language == "python":
                files = [("main.py", _PYTHON_FROM_FILE), ("solution.py", source)]
            else:
                files.append(("output.cpp", _CPP_FROM_FILE))
            files.append(("input.txt", test.input))
        return Program(
            language="python" if self.language == "python" else "c++",
            files=tuple(files),
            stdin="" if self.from_file else test.input,
            run_seconds=self.time_limit_seconds + _CODEFORCES_EXTRA_SECONDS,
            cpu_seconds=self.time_limit_seconds,
            memory_bytes=max(self.memory_limit_bytes, _LEAST_MEMORY_BYTES),
        )


def score_codeforces(
    source: str | None, problem: CodeforcesProblem, run: RunPrograms, *, mode: str, batch_size: int
) -> float | None:
    """Return the score of a program, as `cf_code` says."""
    if problem.tests is None:
        raise ExecutionError(TESTS_MISSING)
    if not problem.tests:
        return None
    if source is None:
        return -1.0
    passed = 0
    for batch in batches_of(problem.tests, batch_size):
        executions = run([problem.program(source, test) for test in batch])
        if not all(execution.compiled for execution in executions):
            return -0.1
        count = sum(_codeforces_passes(problem, executions, batch, run))
        passed += count
        if mode == "pass_fail" and count < len(batch):
            return 0.0
    share = passed / len(problem.tests)
    if mode == "pass_fail":
        return 1.0
    return share if mode == "partial" else float(share == 1) + 0.1 * share


def _codeforces_passes(
    problem: CodeforcesProblem, executions: Sequence[Execution], tests: Sequence[ContestTest], run: RunPrograms
) -> list[bool]:
    if problem.checker is None:
        return [
            execution.succeeded and same_output(execution.stdout, test.output)
            for execution, test in zip(executions, tests, strict=True)
        ]
    to_check = [place for place, execution in enumerate(executions) if execution.succeeded]
    checks = run(
        [
            _checker(
                "python",
                (("checker.py", problem.checker),),
                tests[place],
                executions[place].stdout,
                names=("input.txt", "correct_output.txt", "solution_output.txt"),
            )
            for place in to_check
        ]
    )
    accepted = {place for place, check in zip(to_check, checks, strict=True) if (_printed_score(check) or 0.0) >= 1}
    return [place in accepted for place in range(len(executions))]


def _codeforces_tests(row: Mapping[str, Any]) -> tuple[ContestTest, ...] | None:
    tests = tuple(ContestTest(test["input"], test["output"]) for test in row["official_tests"] or ())
    if not row.get("generated_tests") or row.get("official_tests_complete"):
        return tests
    folder = os.environ.get(TESTS_FOLDER_VARIABLE)
    if not folder:
        return None
    return tests + _generated_tests(folder, str(row["contest_id"])).get(str(row["id"]), ())


@functools.lru_cache(maxsize=32)
def _generated_tests(folder: str, contest: str) -> dict[str, tuple[ContestTest, ...]]:
    """Return the tests of a contest's problems, which are read once for many rows."""
    import pyarrow.parquet

    number = f"{int(contest):04d}" if contest.isdecimal() else contest
    table = pyarrow.parquet.read_table(Path(folder, f"test_cases_{number}.parquet"))
    found: dict[str, tuple[ContestTest, ...]] = {}
    for row in table.to_pylist():
        found[row["problem_id"]] = (*found.get(row["problem_id"], ()), ContestTest(row["input"], row["output"]))
    return found


@dataclass(frozen=True)
class IoiSubtask:
    """A subtask of a problem of the IOI with its tests."""

    problem: str
    tests: tuple[ContestTest, ...]
    grader_files: tuple[tuple[str, str], ...]
    """Sources and headers that are compiled together with the solution."""
    checker_files: tuple[tuple[str, str], ...]
    """Those of the checker; none: outputs are compared."""
    time_limit_seconds: float
    memory_limit_bytes: int
    score_precision: int

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Self:
        """Return the subtask in a row.

        Raises:
            ValueError: a column or a test is missing, or it is of a kind that has a manager beside the solution.
        """
        _need(
            *(row, "id", "test_names", "grader_files", "time_limit", "memory_limit", "score_precision", "test_cases"),
            reward="ioi_code",
        )
        files = [(str(name).rpartition("/")[2], str(content)) for name, content in row["grader_files"]]
        if any(name.startswith("manager.") for name, _ in files):
            raise ValueError(
                f"ioi_code: {row['id']} has a manager, which talks with the solution while it runs; such tasks "
                "(task_type Communication) are not supported: filter them out of the dataset"
            )
        cases = {
            str(case.get("test_name") or case.get("name")): ContestTest(
                case["test_input"] if "test_input" in case else case["input"],
                case["test_output"] if "test_output" in case else case["output"],
            )
            for case in row["test_cases"]
        }
        missing = [name for name in row["test_names"] if name not in cases]
        if missing:
            raise ValueError(f"ioi_code: {row['id']} has no test {missing[0]!r} among its test_cases")
        checker = tuple(file for file in files if re.match(r"checker|testlib\.h", file[0]))
        return cls(
            problem=str(row["id"]),
            tests=tuple(cases[name] for name in row["test_names"]),
            grader_files=tuple(file for file in files if not file[0].startswith("checker")),
            checker_files=checker if any(name == "checker.cpp" for name, _ in checker) else (),
            time_limit_seconds=float(row["time_limit"]),
            memory_limit_bytes=int(row["memory_limit"]),
            score_precision=int(row["score_precision"]),
        )

    def program(self, source: str, test: ContestTest) -> Program:
        """Return the solution with its grader, for a test."""
        return Program(
            language="c++",
            files=((f"{self.problem}.cpp", with_contest_header(source, self.problem)), *self.grader_files),
            stdin=test.input,
            run_seconds=self.time_limit_seconds + _IOI_EXTRA_SECONDS,
            cpu_seconds=self.time_limit_seconds,
            memory_bytes=max(self.memory_limit_bytes, _LEAST_MEMORY_BYTES),
        )


def score_ioi(source: str | None, subtask: IoiSubtask, run: RunPrograms, *, batch_size: int) -> float | None:
    """Return the score of a program, as `ioi_code` says."""
    if not subtask.tests:
        return None
    if source is None:
        return 0.0
    scores: list[float] = []
    for batch in batches_of(subtask.tests, batch_size):
        executions = run([subtask.program(source, test) for test in batch])
        scores += _ioi_scores(subtask, executions, batch, run)
        if min(scores) == 0:
            break
    return float(round(min(scores), subtask.score_precision))


def with_contest_header(source: str, problem: str) -> str:
    """Return the program with the includes and the namespace that solutions are wont to leave out."""
    header = ""
    if "#include <bits/stdc++.h>" not in source:
        header += "#include <bits/stdc++.h>\n"
    if f'#include "{problem}.h"' not in source:
        header += f'#include "{problem}.h"\n'
    if "using namespace std" not in source:
        header += "using namespace std;\n"
    return header + source


def _ioi_scores(
    subtask: IoiSubtask, executions: Sequence[Execution], tests: Sequence[ContestTest], run: RunPrograms
) -> list[float]:
    if not subtask.checker_files:
        return [
            float(execution.succeeded and same_output(execution.stdout, test.output))
            for execution, test in zip(executions, tests, strict=True)
        ]
    scores = [0.0] * len(executions)
    to_check = [place for place, execution in enumerate(executions) if execution.succeeded]
    checks = run(
        [
            _checker(
                "c++",
                subtask.checker_files,
                tests[place],
                executions[place].stdout,
                names=("input.txt", "correct_output.txt", "output.txt"),
            )
            for place in to_check
        ]
    )
    for place, check in zip(to_check, checks, strict=True):
        score = _printed_score(check)
        if not check.compiled or score is None:
            raise ExecutionError(f"the checker of {subtask.problem} gave no score: {check.stderr.strip()[-500:]}")
        scores[place] = min(max(score, 0.0), 1.0)
    return scores


def _checker(
    language: str, files: tuple[tuple[str, str], ...], test: ContestTest, written: str, *, names: tuple[str, str, str]
) -> Program:
    contents = zip(names, (test.input, test.output, written), strict=True)
    return Program(
        language=language,
        files=(*sorted(files, key=lambda file: not file[0].startswith("checker.")), *contents),
        args=names,
        run_seconds=_CHECKER_SECONDS,
        compile_seconds=_CHECKER_SECONDS,
    )


def _printed_score(check: Execution) -> float | None:
    """Return the number that a checker printed first; None where it printed none."""
    words = check.stdout.split()
    try:
        return float(words[0]) if words else None
    except ValueError:
        return None


def _need(row: Mapping[str, Any], *columns: str, reward: str) -> None:
    missing = [column for column in columns if row.get(column) is None]
    if missing:
        raise ValueError(f"{reward} needs the column {missing[0]} with a value in every row")
