"""When the checks of spec.grpo.signal find something in what the trainer logs, and when they find nothing any more."""

from __future__ import annotations

import math

import pytest

from posttrain.api.signal import Signal
from posttrain.contract.facts import SignalLost, SignalRegained
from posttrain_workloads.signal import SignalWatch

DEAD = "frac_reward_zero_std"


def build_watch(**checks: dict[str, object]) -> SignalWatch:
    return SignalWatch(Signal.model_validate(checks).checks.values())


def changes(watch: SignalWatch, values: list[float], *, metric: str = DEAD) -> list[SignalLost | SignalRegained]:
    return [change for step, value in enumerate(values, 1) for change in watch.see({metric: value}, step=step)]


def test_a_signal_is_lost_once_after_the_steps_in_a_row_and_regained_at_the_first_good_one() -> None:
    watch = build_watch(deadReward={"bound": "0.9", "steps": 3})

    assert changes(watch, [1, 0.9, 0.8, 1, 1, 0.95, 1, 1, 0.5, 1]) == [
        SignalLost(
            reason="RewardSignalDead",
            message="frac_reward_zero_std is 0.95 at step 6, and was at least 0.9 for 3 logged steps in a row",
            step=6,
        ),
        SignalRegained(reason="RewardSignalDead", step=9),
    ]


def test_by_default_twenty_steps_are_taken_for_a_loss_and_nineteen_are_not() -> None:
    assert changes(build_watch(), [1.0] * 19 + [0.0] + [1.0] * 19) == []
    assert [change.step for change in changes(build_watch(), [1.0] * 40)] == [20]


@pytest.mark.parametrize(
    ("metric", "good", "bad", "said"),
    [
        ("frac_reward_zero_std", 0.94, 0.95, "RewardSignalDead: at least 0.95"),
        ("entropy", 0.01, 0.009, "EntropyCollapsed: below 0.01"),
        ("kl", 1.0, 1.1, "KlTooLarge: above 1"),
        ("completions/clipped_ratio", 0.94, 0.95, "CompletionsClipped: at least 0.95"),
    ],
)
def test_each_check_reads_its_own_metric_on_its_own_side_of_the_bound(
    metric: str, good: float, bad: float, said: str
) -> None:
    assert changes(build_watch(), [good] * 30, metric=metric) == []
    [change] = changes(build_watch(), [bad] * 30, metric=metric)
    assert isinstance(change, SignalLost)
    reason, side = said.split(": ")
    assert (change.reason, f"was {side} for 20 logged steps" in change.message) == (reason, True)


def test_what_is_no_finite_number_and_what_is_missing_count_neither_way() -> None:
    watch = build_watch(deadReward={"steps": 2}, entropyCollapse={"steps": 2}, klDivergence={"steps": 1})

    assert watch.see({DEAD: 1.0, "entropy": 0.0}, step=1) == []
    assert watch.see({"eval_reward": 0.5, "entropy": None, "kl": math.inf}, step=1) == []
    assert watch.see({DEAD: math.nan, "kl": math.nan}, step=2) == []
    assert [change.reason for change in watch.see({DEAD: 1.0, "entropy": 0.0}, step=3)] == [
        "RewardSignalDead",
        "EntropyCollapsed",
    ]
