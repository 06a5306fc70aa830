"""The rewards of a run as its trainer calls them: built from the spec, each watched for errors.

It owns what becomes of a reward that fails or gives no number; it must not compute any reward.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from posttrain.api.grpo import Reward
from posttrain.contract import environment
from posttrain.contract.config import TrainingConfig
from posttrain_workloads import rewards
from posttrain_workloads.owncode import load_entry_point
from posttrain_workloads.problems import Findings, InvalidInputs, last_lines
from posttrain_workloads.rewards.execution import Execution, ExecutionError, PistonSandbox, Program, Sandbox
from posttrain_workloads.rewards.rented import RentedSandbox, open_machine
from posttrain_workloads.runtime import RankFailure

REASON = "RewardFunctionFailed"
Scores = Sequence[float | None]
Score = Callable[..., Scores | Coroutine[Any, Any, Scores]]
"""TRL's signature: prompts, completions, completion_ids and the data's columns, each a list as long as the others."""

# What the trainer hands to a reward beside lists with an entry a completion (trl/trainer/grpo_trainer.py).
_LOGGERS = frozenset({"log_extra", "log_metric"})
_NOT_A_COLUMN = _LOGGERS | {"trainer_state"}
_EXCERPT = 500
_MIB = 1 << 20


@dataclass
class WatchedSandbox:
    """The sandbox of one reward, which keeps what its programs could not be run for; the machines are shared."""

    sandbox: Sandbox
    last_failure: str = ""
    """Of the newest program that could not be run, in words."""

    @property
    def parallel(self) -> int:
        """As in `Sandbox`."""
        return self.sandbox.parallel

    def run(self, program: Program) -> Execution:
        """Return what the program did. Errors as in `Sandbox`."""
        try:
            return self.sandbox.run(program)
        except ExecutionError as error:
            self.last_failure = str(error)
            raise


@dataclass
class WatchedReward:
    """A reward whose errors are told with the row and completion that they come from, and counted.

    A completion that the reward cannot score has no reward (None), and the others keep theirs.
    """

    name: str
    """As the metrics have it."""
    score: Score
    sandbox: WatchedSandbox | None = None
    """Where it runs programs, if it runs any."""
    last_error: str = ""
    """The newest error of the newest call, in words."""
    loop: asyncio.AbstractEventLoop | None = None
    """In which a reward that is `async def` runs."""

    @property
    def __name__(self) -> str:
        """What TRL names the reward's metrics by."""
        return self.name

    def __call__(
        self, prompts: list[Any], completions: list[Any], log_metric: Callable[[str, float], None], **columns: Any
    ) -> list[float | None]:
        """Return a number, or None, for each completion.

        Raises:
            RankFailure: it returns more or fewer numbers than there are completions.
        """
        self.last_error = ""
        if self.sandbox is not None:
            self.sandbox.last_failure = ""
        lists: dict[str, Any] = {"prompts": prompts, "completions": completions}
        passed_on: dict[str, Any] = {"log_metric": log_metric}
        for key, value in columns.items():
            (passed_on if key in _NOT_A_COLUMN else lists)[key] = value
        try:
            scores = self._score(lists, passed_on)
            failed = self._find_odd_numbers(scores, lists)
        except RankFailure:
            raise
        except Exception as error:  # a reward may raise whatever it likes: what is known of it is told and counted
            scores, failed = self._score_without_culprits(error, lists, passed_on)
        log_metric(f"rewards/{self.name}/failed", failed / len(completions))
        log_metric(f"rewards/{self.name}/unscored", sum(score is None for score in scores) / len(completions))
        return scores

    def why_unscored(self) -> str:
        """Return in words what kept it from scoring in the newest call, as far as is known."""
        failure = self.sandbox.last_failure if self.sandbox is not None else ""
        return self.last_error or (failure and f"Programs of {self.name} could not be run: {failure}")

    def for_trainer(self) -> Callable[..., Any]:
        """Return what TRL calls: for an `async def` a coroutine function, which it awaits together with the others."""
        if not _is_async(self.score):
            return self

        async def call(**columns: Any) -> list[float | None]:
            self.loop = asyncio.get_running_loop()
            return await asyncio.to_thread(self, **columns)

        call.__name__ = self.name
        return call

    def compute(self, **columns: Any) -> Scores:
        """Return what the reward itself gives; an `async def` runs in the trainer's loop, before there is one alone."""
        scores = self.score(**columns)
        if not isinstance(scores, Coroutine):
            return scores
        return asyncio.run_coroutine_threadsafe(scores, self.loop).result() if self.loop else asyncio.run(scores)

    def _score(self, lists: dict[str, Any], passed_on: dict[str, Any]) -> list[float | None]:
        scores = list(self.compute(**lists, **passed_on))
        expected = len(lists["completions"])
        if len(scores) != expected:
            raise RankFailure(
                REASON,
                f"reward {self.name} returned {len(scores)} values for {expected} completions: it must return one for "
                "each, None where it cannot score",
            )
        return scores

    def _find_odd_numbers(self, scores: list[float | None], lists: dict[str, Any]) -> int:
        """Replace what is no finite number by None; return how many there were."""
        odd = 0
        for row, score in enumerate(scores):
            if score is not None and not math.isfinite(score):
                self._tell(f"gives {score}", row=row, lists=lists)
                scores[row] = None
                odd += 1
        return odd

    def _score_without_culprits(
        self, error: Exception, lists: dict[str, Any], passed_on: dict[str, Any]
    ) -> tuple[list[float | None], int]:
        """Return the scores with None for the completions on which the reward fails alone, and how many failed.

        What it logs again is left out: the trainer takes a value a completion.
        """
        passed_on = {key: _log_nothing if key in _LOGGERS else value for key, value in passed_on.items()}
        count = len(lists["completions"])
        good = []
        for row in range(count):
            try:
                self._score(_select(lists, [row]), passed_on)
                good.append(row)
            except Exception as culprit:  # as above
                self._tell(last_lines(culprit, skip=__file__), row=row, lists=lists)
        scores: list[float | None] = [None] * count
        if good and len(good) < count:
            try:
                rest = self._score(_select(lists, good), passed_on)
                failed = count - len(good) + self._find_odd_numbers(rest, _select(lists, good))
                for row, score in zip(good, rest, strict=True):
                    scores[row] = score
                return scores, failed
            except RankFailure:
                raise
            except Exception as again:  # as above
                error = again
        if good:
            self.last_error = (
                f"reward {self.name} fails on {count} completions together: {last_lines(error, skip=__file__)}"
            )
            logging.warning("%s", self.last_error)
        return scores, count

    def _tell(self, what: str, *, row: int, lists: dict[str, Any]) -> None:
        prompt, completion = (_excerpt(lists[key][row]) for key in ("prompts", "completions"))
        of_data = lists[rewards.ROW_COLUMN][row] if rewards.ROW_COLUMN in lists else row
        self.last_error = f"reward {self.name}, row {of_data} (prompt {prompt}, completion {completion}): {what}"
        logging.warning("%s", self.last_error)


def build_rewards(config: TrainingConfig, *, environ: Mapping[str, str]) -> list[WatchedReward]:
    """Return the rewards of spec.grpo.rewards, in their order; those that run programs share a sandbox.

    Raises:
        InvalidInputs: every own reward that does not import.
    """
    assert config.spec.grpo is not None
    findings = Findings()
    shared = open_sandbox(config, environ=environ)
    built: list[WatchedReward] = []
    for index, reward in enumerate(config.spec.grpo.rewards):
        with findings.collect():
            name = _unused(_name(reward), [other.name for other in built])
            sandbox = WatchedSandbox(shared) if shared is not None else None
            score = _build(reward, sandbox=sandbox, path=f"spec.grpo.rewards[{index}]")
            built.append(WatchedReward(name, score, sandbox=sandbox))
    if findings.problems:
        raise InvalidInputs(findings.problems)
    return built


def open_sandbox(config: TrainingConfig, *, environ: Mapping[str, str]) -> PistonSandbox | RentedSandbox | None:
    """Return the sandbox that the run's rewards use; None where none of them runs programs. Nothing is sent yet.

    The ranks share what it takes at the same time; each of them sends it one program at least.
    """
    used = config.spec.used_sandbox
    if used is None:
        return None
    at_once, memory_bytes = max(used.concurrency // config.gang.world_size, 1), used.memory_mib * _MIB
    if used.is_rented:
        lend = open_machine(used.mode, api_key=environ[environment.SANDBOX_KEY], template=used.template)
        return RentedSandbox(used.mode, lend, parallel=at_once, max_memory_bytes=memory_bytes)
    return PistonSandbox(
        environ[environment.SANDBOX_URLS].split(","), per_endpoint=at_once, max_memory_bytes=memory_bytes
    )


def _build(reward: Reward, *, sandbox: Sandbox | None, path: str) -> Score:
    if reward.name is not None:
        score: Score = rewards.build(reward.name, sandbox=sandbox, **reward.params)
        return score
    assert reward.function is not None
    function: Score = load_entry_point(reward.function, path=f"{path}.function")
    return partial(function, **reward.params)


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(function.__call__)


def _name(reward: Reward) -> str:
    return reward.name or str(reward.function).rpartition(":")[2]


def _unused(name: str, taken: Sequence[str]) -> str:
    """Return the name, or with a number where another reward has it: the metrics of both must be told apart."""
    number = 1
    unused = name
    while unused in taken:
        number += 1
        unused = f"{name}-{number}"
    return unused


def _select(lists: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    return {key: [values[row] for row in rows] for key, values in lists.items()}


def _log_nothing(name: str, value: Any) -> None:
    pass


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]}…"
