"""What prepare looks at in the rewards of GRPO: their columns, the servers that they need, own ones on real rows.

It owns these checks and their wording; it must not judge what a reward gives, beyond that it is a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from posttrain.api.grpo_checks import count_groups
from posttrain.api.rewards import REWARDS
from posttrain.api.spelling import join_names, nearest
from posttrain.contract.config import TrainingConfig
from posttrain_workloads.problems import Findings, InvalidInputs, Problem, last_lines, refuse
from posttrain_workloads.prompts import PROMPT, number_rows
from posttrain_workloads.rewards.contests import (
    TESTS_FOLDER_VARIABLE,
    TESTS_MISSING,
    CodeforcesProblem,
    IoiSubtask,
)
from posttrain_workloads.rewards.execution import ExecutionError
from posttrain_workloads.runtime import RankFailure
from posttrain_workloads.scoring import WatchedReward, open_sandbox

if TYPE_CHECKING:
    from datasets import Dataset

TRIED_ROWS = 3
READ_ROWS = 1000
"""Of the problems of contests, which have up to megabytes of tests each."""


def check_endpoints(config: TrainingConfig, findings: Findings, *, environ: Mapping[str, str]) -> None:
    """See that servers and machines for programs that are not ours answer, and have any language; ours is to come."""
    used, sandbox = config.spec.used_sandbox, open_sandbox(config, environ=environ)
    if used is None or sandbox is None or used.mode == "Local":
        return
    path = "spec.grpo.sandbox" if used.is_rented else "spec.grpo.sandbox.endpoints"
    try:
        languages = sandbox.languages()
    except ExecutionError as error:
        findings.add(Problem("SandboxUnreachable", f"{path}: {error}"))
        return
    for url, known in languages.items():
        if not known:
            message = f"{path}: the sandbox {url} has no language: install python and gcc there"
            findings.add(Problem("SandboxUnreachable", message))


def check_columns(config: TrainingConfig, findings: Findings, rows: Dataset, *, of: str) -> bool:
    """See that every column is there that a reward reads; return whether none is known to be missing.

    `of` is, here and below, the field of the spec whose rows they are.
    """
    assert config.spec.grpo is not None
    complete = True
    for index, reward in enumerate(config.spec.grpo.rewards):
        needed = REWARDS[reward.name].columns if reward.name is not None else ()
        for column in needed:
            if column in rows.column_names:
                continue
            others = [name for name in rows.column_names if name != PROMPT]
            there = f"{of} has {join_names(others)}" if others else f"{of} has no column but the prompts"
            reads = f"spec.grpo.rewards[{index}]: reward {reward.name} reads the column {column}, and {there}"
            if (function := config.spec.grpo.rollout_function) is not None:
                findings.warnings.append(f"{reads}: {function} has to return it, with a value for each completion")
                continue
            complete = False
            near = nearest(column, others)
            hint = f"rename one with {of}[].rename: {{{near or 'answer'}: {column}}}"
            findings.add(Problem("DatasetColumnMissing", f"{reads}: {hint}, or choose other data"))
    return complete


def check_contests(config: TrainingConfig, findings: Findings, rows: Dataset, *, of: str) -> None:
    """Read problems of contests as their rewards will, which give nothing where they cannot be read."""
    assert config.spec.grpo is not None
    overrides = config.spec.pod_overrides
    # The folder of the generated tests is the gang's, and not to be seen from here.
    has_tests = any(variable.name == TESTS_FOLDER_VARIABLE for variable in (overrides and overrides.env) or ())
    first = rows.select(range(min(READ_ROWS, len(rows))))
    for index, reward in enumerate(config.spec.grpo.rewards):
        if reward.name not in {"cf_code", "ioi_code"} or set(REWARDS[reward.name].columns) - set(rows.column_names):
            continue
        faults = [fault for row in first if (fault := _find_fault(reward.name, row, has_tests=has_tests)) is not None]
        if not faults:
            continue
        message = (
            f"spec.grpo.rewards[{index}]: reward {reward.name} has no score for {len(faults)} of the first "
            f"{len(first)} rows of {of}. The first of them: {faults[0]}"
        )
        if len(faults) < len(first):
            findings.warnings.append(message)
        else:
            findings.add(Problem("DatasetRowsInvalid", message))


def _find_fault(reward: str, row: Mapping[str, Any], *, has_tests: bool) -> str | None:
    """Return why a row of a contest has no score, whatever the program."""
    try:
        if reward == "ioi_code":
            IoiSubtask.of_row(row)
        elif CodeforcesProblem.of_row(row).tests is None and not has_tests:
            return TESTS_MISSING
    except (ValueError, TypeError, KeyError, OSError) as error:
        return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return None


def try_own_rewards(
    config: TrainingConfig, findings: Findings, rows: Dataset, *, of: str, rewards: list[WatchedReward]
) -> bool:
    """Call each own reward with the first rows and an invented completion, as a step will; return whether none failed.

    Where a rollout function may add what a reward needs, one that fails is no more than a warning.
    """
    assert config.spec.grpo is not None
    lists = _invent_completions(config, rows)
    tried = Findings()
    for index, (reward, built) in enumerate(zip(config.spec.grpo.rewards, rewards, strict=True)):
        if reward.function is not None:
            with tried.collect():
                _try_reward(built, lists, of=of, path=f"spec.grpo.rewards[{index}].function: {reward.function}")
    if (function := config.spec.grpo.rollout_function) is None:
        for problem in tried.problems:
            findings.add(problem)
    else:
        remark = f"If it needs what {function} returns, nothing is wrong"
        findings.warnings += [f"{problem.message}\n{remark}" for problem in tried.problems]
    return not tried.problems


def _invent_completions(config: TrainingConfig, rows: Dataset) -> dict[str, list[Any]]:
    """Return what a step hands to a reward for the first rows, each as often as it is completed."""
    groups = count_groups(config.args, world_size=config.gang.world_size)
    first = number_rows(rows.select(range(min(TRIED_ROWS, len(rows)))))
    few = first.select([row for row in range(len(first)) for _ in range(groups.num_generations if groups else 1)])
    prompts = few[PROMPT][:]
    return {
        "prompts": prompts,
        "completions": [
            "An answer." if isinstance(prompt, str) else [{"role": "assistant", "content": "An answer."}]
            for prompt in prompts
        ],
        "completion_ids": [[0] for _ in prompts],
        **{name: few[name][:] for name in few.column_names if name != PROMPT},
    }


def _try_reward(reward: WatchedReward, lists: Mapping[str, list[Any]], *, of: str, path: str) -> None:
    from transformers import TrainerState

    def log_extra(column: str, values: list[Any]) -> None:
        pass

    def log_metric(name: str, value: float) -> None:
        pass

    completions = lists["completions"]
    try:
        scores = list(reward.compute(**lists, trainer_state=TrainerState(), log_extra=log_extra, log_metric=log_metric))
    except (InvalidInputs, RankFailure):
        raise
    except Exception as error:  # own code: whatever it raises is the answer
        columns = [name for name in lists if name not in ("prompts", "completions", "completion_ids")]
        raise refuse(
            "RewardFunctionFailed",
            f"{path} fails on {len(completions)} completions of the first rows of {of} (columns "
            f"{join_names(columns)}), all of them {completions[0]!r}:\n{last_lines(error, skip=__file__)}",
        ) from error
    odd = [score for score in scores if score is not None and not _is_number(score)]
    if len(scores) != len(completions) or odd:
        what = f"returns {len(scores)} values" if len(scores) != len(completions) else f"returns {odd[0]!r}"
        raise refuse(
            "RewardFunctionFailed",
            f"{path} {what} for {len(completions)} completions of the first rows of {of}: a reward returns a "
            "list with a number, or None where it cannot score, for each of them",
        )


def _is_number(score: Any) -> bool:
    try:
        return math.isfinite(score)
    except TypeError:
        return False
