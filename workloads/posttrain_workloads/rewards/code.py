"""Rewards that run the program in a completion against tests, in a sandbox.

It owns one plain function a reward, in TRL's signature, with the parameters of the table (posttrain.api.rewards) and a
keyword `sandbox`. A test whose program takes too long fails alone; a completion whose programs could not be run gets
None, never 0.0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain_workloads.rewards.completions import Completion, text_of
from posttrain_workloads.rewards.contests import CodeforcesProblem, IoiSubtask, score_codeforces, score_ioi
from posttrain_workloads.rewards.execution import Program, Sandbox
from posttrain_workloads.rewards.programs import (
    RunPrograms,
    extract_code,
    same_output,
    sandbox_language,
    score_all,
)

_TEST_SECONDS = 5.0
_ALL_TESTS = 0.99


def code(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    verification_info: Sequence[Mapping[str, Any]],
    sandbox: Sandbox,
    **columns: Any,
) -> list[float | None]:
    """Return the share of the row's tests that each completion's last block of code passes.

    `verification_info` has `test_cases`, each with `input` and `output`, and a `language` (else Python). A completion
    without a block passes none; a row without tests gets None. Unlike open-r1, the whole output is compared, a test
    that takes too long fails alone, and the row's language is the one that runs.
    """
    scorers = [
        functools.partial(_share_passed, text_of(completion), info)
        for completion, info in zip(completions, verification_info, strict=True)
    ]
    return score_all("code", sandbox, scorers)


def binary_code(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    verification_info: Sequence[Mapping[str, Any]],
    sandbox: Sandbox,
    **columns: Any,
) -> list[float | None]:
    """Return 1.0 for each completion that passes all tests of `code`, else 0.0."""
    shares = code(prompts, completions, completion_ids, verification_info=verification_info, sandbox=sandbox)
    return [None if share is None else float(share > _ALL_TESTS) for share in shares]


def ioi_code(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    sandbox: Sandbox,
    test_batch_size: int = 1,
    **columns: Any,
) -> list[float | None]:
    """Return the score of each completion's C++ program on its row's subtask: the lowest of its tests, rounded.

    The columns are those of open-r1/ioi, and `test_cases` as in open-r1/ioi-test-cases. The tests run in batches, and
    none after a batch in which one got nothing. 0.0 without a program, and where it does not compile.

    Raises:
        ValueError: a row lacks a column or a test.
    """
    rows = _rows(columns, len(completions))
    scorers: list[Callable[[RunPrograms], float | None]] = [
        functools.partial(
            score_ioi, extract_code(text_of(completion), "cpp"), IoiSubtask.of_row(row), batch_size=test_batch_size
        )
        for completion, row in zip(completions, rows, strict=True)
    ]
    return score_all("ioi_code", sandbox, scorers)


def cf_code(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    sandbox: Sandbox,
    test_batch_size: int = 1,
    scoring_mode: str = "weighted_sum",
    **columns: Any,
) -> list[float | None]:
    """Return the score of each completion's program on the tests of its row's Codeforces problem.

    The columns are those of open-r1/codeforces. -1.0 without a program, -0.1 where it does not compile, None without
    tests; else by mode: `pass_fail` 1.0 or 0.0, `partial` the share of passed tests, `weighted_sum` 1.0 for all of them
    and 0.1 times the share. With `pass_fail` no test runs after a batch in which one failed.

    Raises:
        ValueError: a row lacks a column, or has a language that problems cannot be solved in.
    """
    scorers: list[Callable[[RunPrograms], float | None]] = []
    for completion, row in zip(completions, _rows(columns, len(completions)), strict=True):
        problem = CodeforcesProblem.of_row(row)
        program = extract_code(text_of(completion), problem.language)
        scorers.append(
            functools.partial(score_codeforces, program, problem, mode=scoring_mode, batch_size=test_batch_size)
        )
    return score_all("cf_code", sandbox, scorers)


def _share_passed(text: str, info: Mapping[str, Any], run: RunPrograms) -> float | None:
    tests = info["test_cases"]
    if not tests:
        return None
    language = (info.get("language") or "python").lower()
    program = extract_code(text, language)
    if program is None:
        return 0.0
    executions = run(
        [
            Program(
                language=sandbox_language(language),
                files=((_file_name(language), program),),
                stdin=test["input"],
                run_seconds=_TEST_SECONDS,
            )
            for test in tests
        ]
    )
    passed = [
        execution.succeeded and same_output(execution.stdout, test["output"])
        for execution, test in zip(executions, tests, strict=True)
    ]
    return sum(passed) / len(passed)


def _file_name(language: str) -> str:
    endings = {"python": ".py", "cpp": ".cpp", "java": ".java", "javascript": ".js", "bash": ".sh", "r": ".R"}
    return f"{'Main' if language == 'java' else 'main'}{endings.get(language, '.txt')}"


def _rows(columns: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Return the columns' values by row; what has not one for each completion is no column."""
    whole = {
        name: values for name, values in columns.items() if isinstance(values, list | tuple) and len(values) == count
    }
    return [{name: values[index] for name, values in whole.items()} for index in range(count)]
