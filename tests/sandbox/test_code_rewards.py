"""The code rewards' values, worked out by hand, with a sandbox that does as the text of a program says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from posttrain_workloads.rewards.bound import build
from posttrain_workloads.rewards.code import binary_code, cf_code, code, ioi_code
from posttrain_workloads.rewards.execution import Execution, ExecutionError, PistonSandbox, Program
from posttrain_workloads.rewards.programs import extract_code, same_output
from tests.support.sandbox import RunningSandbox

NUMBERS = ("1", "2", "3", "4")
TESTS = [{"input": number, "output": f"{2 * int(number)}\nend\n", "type": "stdin_stdout"} for number in NUMBERS]
INFO = {"language": "python", "test_cases": TESTS}


def doubles(program: Program) -> Execution:
    return Execution(stdout=f"{2 * int(program.stdin)}\nend\n", code=0)


def on(number: str, otherwise: Execution) -> Callable[[Program], Execution]:
    """Right, but for one input."""
    return lambda program: otherwise if program.stdin == number else doubles(program)


BEHAVIOUR: dict[str, Callable[[Program], Execution]] = {
    "right": doubles,
    "other blanks": lambda program: Execution(stdout=f"\n {2 * int(program.stdin)}  \n end\n\n", code=0),
    "first line only": lambda program: Execution(stdout=f"{2 * int(program.stdin)}\n", code=0),
    "a line more": lambda program: Execution(stdout=f"{doubles(program).stdout}more\n", code=0),
    "nothing": lambda _: Execution(stdout="", code=0),
    "wrong on 3": on("3", Execution(stdout="7\nend\n", code=0)),
    "slow on 3": on("3", Execution(stdout="6\nend\n", code=None)),
    "fails on 3": on("3", Execution(stdout="6\nend\n", code=1)),
    "wrong on 1": on("1", Execution(stdout="3\nend\n", code=0)),
    "does not compile": lambda _: Execution(compiled=False, stderr="error"),
}


@dataclass
class SandboxByText:
    """Does what a program's first line says."""

    parallel: int = 3
    programs: list[Program] = field(default_factory=list)
    most_at_once: int = 0
    together: threading.Barrier | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, program: Program) -> Execution:
        with self._lock:
            self.programs.append(program)
        if self.together is not None:
            self.together.wait(timeout=20)
        text = program.files[0][1].strip().splitlines()[-1]
        if text == "broken" or (text == "broken on 3" and program.stdin == "3"):
            raise ExecutionError("the sandbox is gone")
        return BEHAVIOUR["right" if text == "broken on 3" else text](program)


def block(text: str, language: str = "python") -> str:
    return f"<think>\nhm\n</think>\n<answer>\n```{language}\n{text}\n```\n</answer>"


def call(reward: Callable[..., list[float | None]], texts: Sequence[str], **columns: Any) -> list[float | None]:
    """Call a reward as TRL does: one value of each column for each completion."""
    sandbox = columns.pop("sandbox", None) or SandboxByText()
    params = {name: columns.pop(name) for name in ("test_batch_size", "scoring_mode") if name in columns}
    repeated = {name: [value] * len(texts) for name, value in columns.items()}
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    return reward(["p"] * len(texts), completions, [[1]] * len(texts), sandbox=sandbox, **params, **repeated)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("right", 1.0),
        ("other blanks", 1.0),
        ("first line only", 0.0),  # open-r1: 1.0, it compares as many lines as both have
        ("a line more", 0.0),  # open-r1: 1.0
        ("nothing", 0.0),
        ("wrong on 3", 0.75),
        ("slow on 3", 0.75),  # open-r1: 0.0, one slow test ends all
        ("fails on 3", 0.75),
        ("does not compile", 0.0),
        ("broken on 3", None),  # open-r1: a wrong answer
        ("broken", None),
    ],
)
def test_code_is_the_share_of_passed_tests(text: str, value: float | None) -> None:
    assert call(code, [block(text)], verification_info=INFO) == [value]
    assert call(binary_code, [block(text)], verification_info=INFO) == [None if value is None else float(value == 1)]


def test_code_needs_a_block_in_the_rows_language_and_takes_the_last_one() -> None:
    sandbox = SandboxByText()
    texts = ["right", block("right", "cpp"), block("wrong on 1") + block("right"), block("right") + block("nothing")]

    assert call(code, texts, verification_info=INFO, sandbox=sandbox) == [0.0, 0.0, 1.0, 0.0]
    assert {program.language for program in sandbox.programs} == {"python"}
    assert call(code, [block("right", "c++")], verification_info={**INFO, "language": "cpp"}, sandbox=sandbox) == [1.0]
    assert (sandbox.programs[-1].language, sandbox.programs[-1].files) == ("c++", (("main.cpp", "right\n"),))


def test_code_without_tests_gives_nothing() -> None:
    assert call(code, [block("right")], verification_info={"language": "python", "test_cases": []}) == [None]


CF = {
    "id": "1/A",
    "contest_id": "1",
    "language": "python",
    "official_tests": TESTS,
    "time_limit": 2.0,
    "memory_limit": 256.0,
    "input_mode": "stdio",
    "generated_checker": None,
    "generated_tests": 0,
}


@pytest.mark.parametrize(
    ("text", "pass_fail", "partial", "weighted_sum"),
    [
        ("right", 1.0, 1.0, 1.1),
        ("wrong on 3", 0.0, 0.75, 0.075),
        ("slow on 3", 0.0, 0.75, 0.075),
        ("first line only", 0.0, 0.0, 0.0),
        ("does not compile", -0.1, -0.1, -0.1),
        ("broken on 3", None, None, None),
    ],
)
@pytest.mark.parametrize("batch", [1, 3, -1])
def test_cf_code_scores_by_its_mode(
    text: str, pass_fail: float | None, partial: float | None, weighted_sum: float | None, batch: int
) -> None:
    for mode, value in (("pass_fail", pass_fail), ("partial", partial), ("weighted_sum", weighted_sum)):
        rewards = call(cf_code, [block(text)], scoring_mode=mode, test_batch_size=batch, **CF)
        assert rewards == [None if value is None else pytest.approx(value)]


def test_cf_code_without_a_program_or_tests() -> None:
    assert call(cf_code, ["no block", block("right", "cpp")], **CF) == [-1.0, -1.0]
    assert call(cf_code, [block("right")], **{**CF, "official_tests": []}) == [None]


def test_cf_code_without_the_generated_tests_that_it_needs_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CF_TESTS_FOLDER", raising=False)

    assert call(cf_code, [block("right")], **{**CF, "generated_tests": 7}) == [None]
    complete = {**CF, "generated_tests": 7, "official_tests_complete": True}
    assert call(cf_code, [block("right")], **complete) == [pytest.approx(1.1)]


def test_cf_code_refuses_a_language_and_a_missing_column() -> None:
    with pytest.raises(ValueError, match="cf_code runs python and cpp, and a row has the language 'java'"):
        call(cf_code, [block("right")], **{**CF, "language": "java"})
    with pytest.raises(ValueError, match="cf_code needs the column time_limit"):
        call(cf_code, [block("right")], **{name: value for name, value in CF.items() if name != "time_limit"})


def test_pass_fail_stops_after_the_batch_that_failed_and_the_others_do_not() -> None:
    ran = {}
    for mode, batch in (("pass_fail", 1), ("pass_fail", 2), ("pass_fail", 3), ("pass_fail", -1), ("partial", 1)):
        sandbox = SandboxByText()
        call(cf_code, [block("wrong on 1")], scoring_mode=mode, test_batch_size=batch, sandbox=sandbox, **CF)
        ran[mode, batch] = len(sandbox.programs)

    assert ran == {
        ("pass_fail", 1): 1,
        ("pass_fail", 2): 2,
        ("pass_fail", 3): 3,
        ("pass_fail", -1): 4,
        ("partial", 1): 4,
    }


@pytest.mark.parametrize("batch", [4, -1])
def test_a_batch_of_tests_runs_at_once(batch: int) -> None:
    """With -1 open-r1 runs no test at all, and gives 0."""
    sandbox = SandboxByText(parallel=4, together=threading.Barrier(4))

    assert call(cf_code, [block("right")], test_batch_size=batch, sandbox=sandbox, **CF) == [pytest.approx(1.1)]


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="test_batch_size must be at least 1, or -1"):
        call(cf_code, [block("right")], test_batch_size=0, **CF)


def test_cf_code_keeps_the_problems_limits() -> None:
    sandbox = SandboxByText()
    call(cf_code, [block("right")], sandbox=sandbox, **CF)
    [program, *_] = sandbox.programs

    assert (program.cpu_seconds, program.run_seconds, program.memory_bytes) == (2.0, 12.0, 256 << 20)


HEADER = '#include <bits/stdc++.h>\n#include "plants.h"\nusing namespace std;\n'
IOI = {
    "id": "plants",
    "year": 2020,
    "test_names": ["0-01", "0-02", "0-03", "0-04"],
    "test_cases": [
        {"test_name": f"0-0{number}", "test_input": number, "test_output": f"{2 * int(number)}\nend\n"}
        for number in (*NUMBERS, "5")
    ],
    "grader_files": [["graders/grader.cpp", "int main() {}"], ["graders/plants.h", "int f();"]],
    "time_limit": 1.5,
    "memory_limit": 1 << 28,
    "score_precision": 2,
}


@pytest.mark.parametrize(
    ("text", "value", "runs"),
    [
        ("right", 1.0, 4),
        ("wrong on 1", 0.0, 1),
        ("wrong on 3", 0.0, 3),
        ("slow on 3", 0.0, 3),
        ("does not compile", 0.0, 1),
    ],
)
def test_ioi_code_is_the_lowest_score_of_the_subtasks_tests(text: str, value: float, runs: int) -> None:
    sandbox = SandboxByText()

    assert call(ioi_code, [block(text, "cpp")], sandbox=sandbox, **IOI) == [value]
    assert len(sandbox.programs) == runs
    assert call(ioi_code, [block(text, "cpp")], test_batch_size=-1, **IOI) == [value]


def test_ioi_code_without_a_program_is_0_and_without_a_sandbox_nothing() -> None:
    assert call(ioi_code, ["no block", block("broken", "cpp")], **IOI) == [0.0, None]


def test_ioi_code_sends_solution_and_grader_with_the_header_that_is_missing() -> None:
    sandbox = SandboxByText()
    call(ioi_code, [block("right", "cpp")], sandbox=sandbox, **IOI)

    assert sandbox.programs[0] == Program(
        language="c++",
        files=(("plants.cpp", f"{HEADER}right\n"), ("grader.cpp", "int main() {}"), ("plants.h", "int f();")),
        stdin="1",
        run_seconds=4.5,
        cpu_seconds=1.5,
        memory_bytes=1 << 28,
    )


@dataclass
class CheckedSandbox(SandboxByText):
    """As its parent for solutions; a checker prints what it is made to."""

    printed: tuple[str, ...] = ()

    def run(self, program: Program) -> Execution:
        if program.files[0][0].startswith("checker"):
            with self._lock:
                self.programs.append(program)
            contents = dict(program.files)
            return Execution(stdout=self.printed[int(contents["input.txt"]) - 1], code=0)
        return super().run(program)


def test_ioi_code_takes_the_checkers_score_rounded() -> None:
    sandbox = CheckedSandbox(printed=("1.0\n", "0.4567\n", "0.9\n", "1\n"))
    row = {**IOI, "grader_files": [*IOI["grader_files"], ["checker/checker.cpp", "c"]]}

    assert call(ioi_code, [block("wrong on 1", "cpp")], sandbox=sandbox, **row) == [0.46]
    checkers = [program for program in sandbox.programs if program.files[0][0] == "checker.cpp"]
    assert (checkers[0].args, dict(checkers[0].files)) == (
        ("input.txt", "correct_output.txt", "output.txt"),
        {"checker.cpp": "c", "input.txt": "1", "correct_output.txt": "2\nend\n", "output.txt": "3\nend\n"},
    )


def test_a_checker_that_prints_no_score_is_no_wrong_answer() -> None:
    sandbox = CheckedSandbox(printed=("1", "what?", "1", "1"))
    row = {**IOI, "grader_files": [["checker.cpp", "c"]]}

    assert call(ioi_code, [block("right", "cpp")], sandbox=sandbox, **row) == [None]


def test_ioi_code_refuses_what_it_cannot_run() -> None:
    with pytest.raises(ValueError, match="has a manager, which talks with the solution"):
        call(ioi_code, [block("right", "cpp")], **{**IOI, "grader_files": [["graders/manager.cpp", ""]]})
    with pytest.raises(ValueError, match="plants has no test '9-99' among its test_cases"):
        call(ioi_code, [block("right", "cpp")], **{**IOI, "test_names": ["9-99"]})
    with pytest.raises(ValueError, match="ioi_code needs the column test_cases"):
        call(ioi_code, [block("right", "cpp")], **{**IOI, "test_cases": None})


def test_cf_code_passes_what_the_checker_accepts() -> None:
    sandbox = CheckedSandbox(printed=("1", "0", "Traceback", "1\n"))

    rewards = call(
        cf_code, [block("nothing")], scoring_mode="partial", sandbox=sandbox, **{**CF, "generated_checker": "check"}
    )

    assert rewards == [0.5]


def test_completions_are_scored_at_the_same_time_and_one_failure_is_its_own() -> None:
    texts = [block(text) for text in ("right", "broken", "wrong on 3", "slow on 3")] * 4

    assert call(code, texts, verification_info=INFO) == [1.0, None, 0.75, 0.75] * 4


def test_code_rewards_work_from_any_thread() -> None:
    found: list[list[float | None]] = []
    threads = [
        threading.Thread(target=lambda: found.append(call(code, [block("wrong on 3")], verification_info=INFO)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == [[0.75]] * 4


@pytest.mark.parametrize(
    ("written", "expected", "same"),
    [
        ("1\n2\n", "1\n2", True),
        (" 1 \r\n2", "1\n2", True),
        ("1\n\n2", "1\n2", False),
        ("1", "1\n2", False),
        ("1\n2", "1", False),
        ("", "", True),
        ("1 2", "1  2", False),
    ],
)
def test_outputs_are_compared_as_a_whole(written: str, expected: str, same: bool) -> None:
    assert same_output(written, expected) is same


def test_a_block_is_found_by_its_mark() -> None:
    assert extract_code("```python\na\n```", "python") == "a\n"
    assert extract_code("```py\na\n```", "python") == "a\n"
    assert extract_code("```C++\na\n```", "cpp") == "a\n"
    assert extract_code("```\na\n```", "python") is None
    assert extract_code("```python\na", "python") is None


ECHO = "print(2 * int(input()), 'end', sep='\\n')"


def test_the_registry_binds_the_sandbox_and_the_parameters() -> None:
    sandbox = SandboxByText()
    reward = build("cf_code", sandbox=sandbox, scoring_mode="partial", test_batch_size=-1)

    assert reward(["p"], [block("wrong on 3")], [[1]], **{name: [value] for name, value in CF.items()}) == [0.75]


def test_real_programs_get_their_values(sandbox: RunningSandbox) -> None:
    real = PistonSandbox([sandbox.url], per_endpoint=4)
    solutions = [
        ECHO,
        "number = int(input())\nwhile number == 3: pass\nprint(2 * number, 'end', sep='\\n')",
        "import socket; socket.socket()",
    ]
    info = {"language": "python", "test_cases": TESTS[1:3]}

    assert call(code, [block(text) for text in solutions], verification_info=info, sandbox=real) == [1.0, 0.5, 0.0]


CPP_FILE = """
#include <fstream>
int main() { int number; std::ifstream("input.txt") >> number; std::ofstream("output.txt") << 2 * number << " end"; }
"""
PYTHON_FILE = "number = int(open('input.txt').read())\nopen('output.txt', 'w').write(f'{2 * number} end')"
CHECKER = """
import sys
_, expected, written = (open(name).read().split() for name in sys.argv[1:])
print(int(expected == written))
"""


def test_real_programs_read_files_and_are_checked(sandbox: RunningSandbox) -> None:
    real = PistonSandbox([sandbox.url], per_endpoint=4)
    row = {**CF, "input_mode": "file", "official_tests": TESTS[:1], "generated_checker": CHECKER}

    assert call(cf_code, [block(PYTHON_FILE)], sandbox=real, **row) == [pytest.approx(1.1)]
    assert call(cf_code, [block(CPP_FILE, "cpp")], sandbox=real, **{**row, "language": "cpp"}) == [pytest.approx(1.1)]


GRADER = """
#include <iostream>
#include "plants.h"
int main() { int number; std::cin >> number; std::cout << twice(number) << "\\nend\\n"; }
"""


def test_a_real_solution_is_compiled_with_its_grader(sandbox: RunningSandbox) -> None:
    real = PistonSandbox([sandbox.url], per_endpoint=4)
    graders = [["graders/grader.cpp", GRADER], ["graders/plants.h", "int twice(int);"]]
    row = {**IOI, "grader_files": graders, "test_names": ["0-01", "0-05"]}
    row["test_cases"] = [
        {"name": "0-01", "input": "1", "output": "2\nend"},
        {"name": "0-05", "input": "5", "output": "10\nend"},
    ]

    right, wrong = block("int twice(int n) { return 2 * n; }", "cpp"), block("int twice(int n) { return 2; }", "cpp")
    assert call(ioi_code, [right, wrong], sandbox=real, test_batch_size=-1, **row) == [1.0, 0.0]


IOI_CHECKER = r"""
#include <fstream>
#include <iostream>
int main(int, char **names) {
    std::ifstream input(names[1]), correct(names[2]), written(names[3]);
    double number, expected, found;
    input >> number, correct >> expected, written >> found;
    std::cout << (found == expected ? 1.0 : found == number ? 0.255 : 0.0) << std::endl;
    std::cerr << "checked" << std::endl;
}
"""


def test_a_real_checker_gives_a_part_of_the_score(sandbox: RunningSandbox) -> None:
    real = PistonSandbox([sandbox.url], per_endpoint=4)
    files = [["graders/grader.cpp", GRADER], ["graders/plants.h", "int twice(int);"], ["checker.cpp", IOI_CHECKER]]
    case = {"name": "0-01", "input": "3", "output": "6\nend"}
    row = {**IOI, "grader_files": files, "test_names": ["0-01"], "test_cases": [case]}

    blocks = [block(f"int twice(int n) {{ return {value}; }}", "cpp") for value in ("2 * n", "n", "1")]
    assert call(ioi_code, blocks, sandbox=real, **row) == [1.0, 0.26, 0.0]
