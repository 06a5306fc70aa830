"""Rewards as the trainer calls them: what becomes of errors, odd numbers and silence in one."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from posttrain.api.training_run import TrainingRunSpec
from posttrain.contract.config import GangShape, HubSource, RunIdentity, TrainingConfig
from posttrain_workloads import rewards
from posttrain_workloads.rewards.execution import Execution, ExecutionError, PistonSandbox, Program
from posttrain_workloads.rewards.rented import RentedSandbox
from posttrain_workloads.runtime import RankFailure
from posttrain_workloads.scoring import WatchedReward, WatchedSandbox, open_sandbox


def call(score: Any, *, completions: list[str]) -> tuple[WatchedReward, list[float | None], dict[str, float]]:
    """Return the reward, its scores and what it logged."""
    logged: dict[str, float] = {}
    reward = WatchedReward("mine", score)
    scores = reward(
        prompts=["?"] * len(completions),
        completions=completions,
        log_metric=logged.__setitem__,
        trainer_state=None,
        solution=completions,
    )
    return reward, scores, logged


def count_letters(prompts: list[str], completions: list[str], solution: list[str], **columns: Any) -> list[int | None]:
    assert solution == completions
    if "bad" in completions:
        raise ValueError("cannot read it")
    return [len(completion) or None for completion in completions]


def test_a_reward_scores_what_it_can_and_the_rest_is_counted() -> None:
    _, scores, logged = call(count_letters, completions=["a", "bb", "", "cc"])
    assert scores == [1, 2, None, 2]
    assert logged == {"rewards/mine/failed": 0, "rewards/mine/unscored": 0.25}


def test_a_completion_on_which_a_reward_fails_is_named_and_takes_nothing_from_the_others() -> None:
    reward, scores, logged = call(count_letters, completions=["a", "bad", "ccc", "bad"])
    assert scores == [1, None, 3, None]
    assert logged == {"rewards/mine/failed": 0.5, "rewards/mine/unscored": 0.5}
    assert reward.last_error.startswith("reward mine, row 3 (prompt '?', completion 'bad'): ")
    assert reward.last_error.endswith("ValueError: cannot read it")


def test_what_a_reward_logs_before_it_fails_is_taken_once_and_its_row_is_that_of_the_data() -> None:
    kept: list[str] = []

    def read(completions: list[str], log_extra: Any, log_metric: Any, **columns: Any) -> list[float]:
        log_extra("read", completions)
        log_metric("calls", 1.0)
        return [float(completion) for completion in completions]

    reward = WatchedReward("mine", read)
    logged: list[str] = []
    scores = reward(
        prompts=["?"] * 3,
        completions=["1", "bad", "3"],
        posttrain_row=[17, 23, 23],
        log_extra=lambda name, values: kept.extend(values),
        log_metric=lambda name, value: logged.append(name),
    )

    assert scores == [1.0, None, 3.0]
    assert kept == ["1", "bad", "3"]
    assert logged == ["calls", "rewards/mine/failed", "rewards/mine/unscored"]
    assert reward.last_error.startswith("reward mine, row 23 (prompt '?', completion 'bad'): ")


def test_a_number_that_is_not_finite_is_no_reward() -> None:
    reward, scores, logged = call(lambda completions, **_: [math.nan, 1.0], completions=["a", "b"])
    assert scores == [None, 1.0]
    assert logged == {"rewards/mine/failed": 0.5, "rewards/mine/unscored": 0.5}
    assert reward.last_error == "reward mine, row 0 (prompt '?', completion 'a'): gives nan"


def test_a_reward_that_fails_only_on_all_together_scores_none() -> None:
    def compare(completions: list[str], **columns: Any) -> list[float]:
        if len(completions) > 1:
            raise KeyError("two")
        return [1.0]

    reward, scores, logged = call(compare, completions=["a", "b"])
    assert scores == [None, None]
    assert logged["rewards/mine/failed"] == 1
    assert reward.last_error.startswith("reward mine fails on 2 completions together: ")


class FailingSandbox:
    """Runs no program as long as it is told to fail."""

    parallel = 2
    failing = True

    def run(self, program: Program) -> Execution:
        if self.failing:
            raise ExecutionError("nobody answers")
        return Execution(stdout="1", stderr="", code=0)


def test_why_a_reward_scored_nothing_is_of_its_newest_call_and_of_its_own_programs() -> None:
    machines = FailingSandbox()
    watched = [WatchedSandbox(machines), WatchedSandbox(machines)]
    programs = WatchedReward("code", rewards.build("code", sandbox=watched[0]), sandbox=watched[0])
    broken = WatchedReward("mine", count_letters, sandbox=watched[1])
    test = {"language": "python", "test_cases": [{"input": "", "output": "1"}]}
    lists: dict[str, Any] = {"prompts": ["?"], "log_metric": lambda name, value: None}

    def run_program() -> list[float | None]:
        return programs(
            completions=["```python\nprint(1)\n```"], completion_ids=[[1]], verification_info=[test], **lists
        )

    assert run_program() == [None]
    assert broken(completions=["bad"], solution=["bad"], **lists) == [None]
    assert programs.why_unscored() == "Programs of code could not be run: nobody answers"
    assert broken.why_unscored().endswith("ValueError: cannot read it")

    machines.failing = False
    assert run_program() == [1.0]
    assert broken(completions=["good"], solution=["good"], **lists) == [4]
    assert (programs.why_unscored(), broken.why_unscored()) == ("", "")


def test_rewards_that_are_async_are_awaited_together_and_watched_like_others() -> None:
    """Each waits until the other one has begun: one after the other they would never end."""
    begun: list[asyncio.Event] = []

    async def meet(completions: list[str], **columns: Any) -> list[float]:
        begun.append(asyncio.Event())
        while len(begun) < 2:
            await asyncio.sleep(0)
        if "bad" in completions:
            raise ValueError("cannot read it")
        return [1.0] * len(completions)

    rewards = [WatchedReward(name, meet) for name in ("one", "two")]
    calls = [reward.for_trainer() for reward in rewards]
    logged: dict[str, float] = {}
    columns: dict[str, Any] = {"prompts": ["?", "?"], "log_metric": logged.__setitem__, "trainer_state": None}

    async def call_all() -> list[list[float | None]]:
        return list(await asyncio.gather(*(call(completions=["good", "bad"], **columns) for call in calls)))

    assert asyncio.run(asyncio.wait_for(call_all(), timeout=60)) == [[1.0, None], [1.0, None]]
    assert [call.__name__ for call in calls] == ["one", "two"]
    assert logged["rewards/one/failed"] == logged["rewards/two/failed"] == 0.5
    assert rewards[0].last_error.endswith("ValueError: cannot read it")
    reward = WatchedReward("plain", count_letters)
    assert reward.for_trainer() is reward


def test_before_there_is_a_trainer_an_async_reward_runs_by_itself() -> None:
    async def score(completions: list[str], **columns: Any) -> list[float]:
        return [2.0 for _ in completions]

    assert WatchedReward("mine", score).compute(completions=["a"]) == [2.0]


def test_a_wrong_number_of_values_ends_the_run() -> None:
    with pytest.raises(RankFailure, match="reward mine returned 1 values for 2 completions") as failed:
        call(lambda completions, **_: [1.0], completions=["a", "b"])
    assert failed.value.reason == "RewardFunctionFailed"


@pytest.mark.parametrize(("ranks", "parallel"), [(1, 8), (3, 2), (9, 2)])
def test_the_ranks_share_what_the_sandboxes_take_at_the_same_time(ranks: int, parallel: int) -> None:
    endpoints = ["http://piston:2000", "http://piston:2001"]
    config = build_config(ranks=ranks, sandbox={"mode": "Piston", "endpoints": endpoints, "concurrency": 4})

    sandbox = open_sandbox(config, environ={"POSTTRAIN_SANDBOX_URLS": ",".join(endpoints)})

    assert isinstance(sandbox, PistonSandbox)
    assert (list(sandbox.urls), sandbox.parallel) == (endpoints, parallel)


def test_a_service_lends_the_ranks_together_as_many_machines_as_programs_run_at_the_same_time() -> None:
    key = {"name": "e2b", "key": "api-key"}
    config = build_config(ranks=2, sandbox={"mode": "E2B", "apiKeySecretRef": key, "concurrency": 6, "memoryMib": 100})

    sandbox = open_sandbox(config, environ={"POSTTRAIN_SANDBOX_KEY": "secret"})

    assert isinstance(sandbox, RentedSandbox)
    assert (sandbox.name, sandbox.parallel, sandbox.max_memory_bytes) == ("E2B", 3, 100 << 20)


def build_config(*, ranks: int, sandbox: dict[str, Any]) -> TrainingConfig:
    spec = TrainingRunSpec.model_validate(
        {
            "model": {"source": "org/model"},
            "datasets": [{"source": "org/data"}],
            "grpo": {"rewards": [{"name": "code"}], "sandbox": sandbox},
        }
    )
    return TrainingConfig(
        run=RunIdentity(kind="TrainingRun", namespace="team", name="demo"),
        attempt=1,
        method="grpo",
        config_hash="",
        spec=spec,
        args={},
        model=HubSource(repo="org/model", revision="main"),
        datasets=(),
        eval_datasets=(),
        gang=GangShape(num_nodes=1, processes_per_node=ranks, gpus_per_node=0),
    )
