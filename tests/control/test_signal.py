"""What follows when a grpo run loses the signal that it learns from: what its owner chose, and what people see."""

from __future__ import annotations

import json
from typing import Any

import pytest

from posttrain.contract.facts import NonFinite, SignalLost, SignalRegained, Started
from posttrain.contract.result import Result
from posttrain.control.kinds import CONFIG_MAP, PYTORCHJOB
from tests.support.bench import Bench
from tests.support.builders import GRPO

SAID = "frac_reward_zero_std is 1 at step 7, and was at least 0.95 for 3 logged steps in a row"
LOST = SignalLost(reason="RewardSignalDead", message=SAID, step=7)
CLIPPED = SignalLost(reason="CompletionsClipped", message="cut off", step=8)


def signal(**policies: str) -> dict[str, Any]:
    return {**GRPO, "signal": {field: {"policy": policy} for field, policy in policies.items()}}


def train(**policies: str) -> Bench:
    """Return a bench with a gang that trains."""
    bench = Bench()
    bench.submit(sft=None, grpo=signal(**policies))
    begin(bench, attempt=1)
    return bench


def begin(bench: Bench, *, attempt: int) -> None:
    bench.settle()
    bench.others.finish_deletions()
    bench.settle()
    bench.others.make_pods()
    bench.others.run_pods(attempt)
    bench.others.tell(Started(world_size=1, max_steps=20, resumed_from_step=0), attempt=attempt)
    bench.settle()


def test_a_warning_changes_nothing_but_a_condition_and_is_told_once_and_when_it_is_over() -> None:
    bench = train()
    assert bench.says("SignalHealthy") == ("True", "SignalHealthy")
    quiet = bench.events()

    bench.others.tell(LOST, CLIPPED, attempt=1)
    bench.settle()
    condition = bench.condition("SignalHealthy")
    assert (condition.status, condition.reason, condition.message) == ("False", "RewardSignalDead", f"{SAID}; cut off")
    assert (bench.status.stage, bench.status.attempt, bench.status.failure) == ("Training", 1, None)
    assert bench.says("Succeeded") == ("False", "InProgress")

    bench.others.tell(
        SignalRegained(reason="RewardSignalDead", step=9),
        SignalRegained(reason="CompletionsClipped", step=9),
        attempt=1,
    )
    bench.settle()
    assert bench.says("SignalHealthy") == ("True", "SignalHealthy")
    assert bench.events() == [
        *quiet,
        f"RewardSignalDead: {SAID}; cut off",
        "SignalHealthy: No check finds anything in what the run learns from.",
    ]


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_a_loss_that_is_no_number_may_be_a_warning_until_the_next_attempt(method: str) -> None:
    bench = Bench()
    grpo = {"sft": None, "grpo": signal()} if method == "grpo" else {}
    bench.submit(restarts={"onNonFinite": "Warn"}, **grpo)
    begin(bench, attempt=1)
    assert bench.says("SignalHealthy") == ("True", "SignalHealthy")
    quiet = bench.events()

    bench.others.tell(NonFinite(metric="loss", step=7), attempt=1)
    bench.settle()
    assert bench.says("SignalHealthy") == ("False", "NonFiniteLoss")
    assert (bench.status.stage, bench.status.attempt, bench.status.failure) == ("Training", 1, None)
    assert bench.events() == [*quiet, "NonFiniteLoss: loss was not finite at step 7"]

    bench.others.fail_gang(1, exit_code=138)
    bench.settle()
    bench.wait(60)
    begin(bench, attempt=2)
    assert bench.says("SignalHealthy") == ("True", "SignalHealthy")


def test_whoever_changes_his_mind_about_a_loss_that_was_no_number_is_heard_at_once() -> None:
    bench = Bench()
    bench.submit(restarts={"onNonFinite": "Warn"})
    begin(bench, attempt=1)
    bench.others.tell(NonFinite(metric="loss", step=7), attempt=1)
    bench.settle()

    bench.others.change_run(restarts={"onNonFinite": "Suspend"})
    bench.settle()
    assert (bench.status.stage, bench.status.attempt) == ("Suspended", 2)
    assert "(spec.restarts.onNonFinite)" in bench.condition("Succeeded").message


@pytest.mark.parametrize("before", ["Suspend", "Fail"])
def test_a_gang_that_ends_at_a_loss_that_is_only_to_be_a_warning_since_is_held_and_goes_on(before: str) -> None:
    bench = Bench()
    bench.submit(restarts={"onNonFinite": before})
    begin(bench, attempt=1)

    bench.others.change_run(restarts={"onNonFinite": "Warn"})
    bench.settle()
    bench.others.tell(NonFinite(metric="loss", step=7), attempt=1)
    bench.settle()
    assert bench.status.stage == "Training"
    said = "loss was not finite at step 7"
    bench.others.fail_gang(1, exit_code=1, result=Result(reason="NonFiniteLoss", message=said))
    bench.settle()
    failure = bench.status.failure
    assert (bench.status.stage, bench.status.attempt) == ("Suspended", 2)
    assert (failure and failure.reason, bench.says("Succeeded")) == ("NonFiniteLoss", ("False", "NonFiniteLoss"))
    assert "(spec.restarts.onNonFinite was not Warn when the attempt began)" in bench.condition("Succeeded").message

    for suspend in (True, False):
        bench.others.change_run(suspend=suspend)
        bench.settle()
    begin(bench, attempt=2)
    assert bench.status.stage == "Training"
    config = bench.others.find(CONFIG_MAP, "demo-a2")
    assert config is not None
    assert json.loads(config["data"]["config.json"])["spec"]["restarts"]["onNonFinite"] == "Warn"


def test_a_gang_that_ends_at_a_loss_that_is_to_be_the_end_since_ends_the_run() -> None:
    bench = Bench()
    bench.submit(restarts={"onNonFinite": "Suspend"})
    begin(bench, attempt=1)
    bench.others.change_run(restarts={"onNonFinite": "Fail"})
    bench.others.fail_gang(1, exit_code=1, result=Result(reason="NonFiniteLoss", message="loss was not finite"))
    bench.settle()
    assert (bench.status.stage, bench.says("Succeeded")) == ("Failed", ("False", "NonFiniteLoss"))


def test_a_suspension_ends_the_attempt_at_no_cost_until_the_checks_are_changed() -> None:
    bench = train(deadReward="Suspend")
    bench.others.tell(LOST, attempt=1)
    bench.settle()

    assert (bench.status.stage, bench.status.attempt) == ("Suspended", 2)
    assert bench.says("SignalHealthy") == bench.says("Succeeded") == ("False", "RewardSignalDead")
    assert "the run is suspended (spec.grpo.signal.deadReward.policy)" in bench.condition("Succeeded").message
    bench.others.finish_deletions()
    bench.settle()
    assert bench.names(PYTORCHJOB) == []
    assert bench.events()[-1].startswith(f"RewardSignalDead: attempt 1: {SAID}")
    assert [event for event in bench.events() if "Dead" in event] == bench.events()[-1:]

    bench.others.change_run(grpo=signal(deadReward="Warn"))
    begin(bench, attempt=2)
    restarts = bench.status.restarts
    assert restarts is not None
    assert (bench.status.stage, restarts.infrastructure, restarts.application) == ("Training", 0, 0)
    assert bench.says("SignalHealthy") == ("True", "SignalHealthy")
    assert bench.says("Accepted") == ("True", "Accepted")


def test_a_failure_ends_the_run_with_advice_and_frees_what_it_held() -> None:
    bench = train(deadReward="Fail")
    bench.others.tell(LOST, attempt=1)
    bench.settle()

    failure = bench.status.failure
    assert failure is not None
    assert (bench.status.stage, failure.reason, failure.message) == (
        "Failed",
        "RewardSignalDead",
        f"attempt 1: {SAID}",
    )
    assert failure.advice is not None and "harder prompts" in failure.advice
    assert bench.says("Finished") == ("True", "RewardSignalDead")
    bench.others.finish_deletions()
    bench.settle()
    assert bench.names(PYTORCHJOB) == []


def test_of_several_findings_the_one_with_the_worst_consequence_counts() -> None:
    bench = train(deadReward="Suspend", clippedCompletions="Fail")
    bench.others.tell(LOST, CLIPPED, attempt=1)
    bench.settle()

    assert bench.says("Succeeded") == bench.says("SignalHealthy") == ("False", "CompletionsClipped")


def test_a_policy_that_is_made_stricter_counts_for_what_was_found_before() -> None:
    bench = train()
    bench.others.tell(LOST, attempt=1)
    bench.settle()

    bench.others.change_run(grpo=signal(deadReward="Suspend"))
    bench.settle()
    assert (bench.status.stage, bench.status.attempt) == ("Suspended", 2)


@pytest.mark.parametrize("policy", ["Suspend", "Fail"])
def test_a_run_that_went_through_is_complete_whatever_was_found(policy: str) -> None:
    bench = train(deadReward=policy)
    bench.others.tell(LOST, attempt=1)
    bench.others.complete_gang(1, result=Result(reason="Completed", message="done"))
    bench.settle()

    assert bench.status.stage == "Succeeded"
    assert bench.says("SignalHealthy") == ("False", "RewardSignalDead")
