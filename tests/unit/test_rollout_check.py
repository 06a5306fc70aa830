"""A server with other weights than the trainer is found and named, however many others there are."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain_workloads.rollout_check import StaleRolloutWeights, attribute, bound_for, check_differences
from posttrain_workloads.rollout_modes import find_changing_keys

ROUNDING = 3e-6
SERVERS = tuple(f"http://tiny-server-{number}.tiny-server:8000" for number in range(64))


DEFAULTS = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "vllm_structured_outputs_regex": None,
    "generation_kwargs": None,
}


def check(*differences: float, overall: float | None = None) -> None:
    check_differences(
        dict(zip(SERVERS, differences, strict=False)),
        overall=sum(differences) / len(differences) if overall is None else overall,
        bound=bound_for("float32"),
        where="rollout servers",
        step=7,
    )


def test_what_rounding_explains_is_no_finding() -> None:
    check(ROUNDING, 2.4e-5, 3e-4)


def test_one_stale_server_of_64_is_named_though_the_mean_of_all_is_within_the_bound() -> None:
    differences = [ROUNDING] * 64
    differences[41] = 0.005
    assert sum(differences) / 64 < bound_for("float32")

    with pytest.raises(StaleRolloutWeights) as raised:
        check(*differences)

    assert str(raised.value) == (
        "at step 7 the log-probabilities of the completions differ from the trainer's in those of "
        f"{SERVERS[41]} (by 0.005), and not in those of the other rollout servers (63); rounding explains 0.0003: "
        "vLLM has other weights there than the trainer, or computes in another dtype"
    )


def test_all_are_named_where_none_has_the_weights() -> None:
    with pytest.raises(
        StaleRolloutWeights, match=r"in those of all rollout servers: \S+-0\S+ \(by 0.2\) and \S+-1\S+ "
    ):
        check(0.2, 0.3)


def test_tokens_that_belong_to_no_server_count_in_the_mean_of_all() -> None:
    with pytest.raises(StaleRolloutWeights, match=r"differ by 0.02 between vLLM and the trainer, and nobody knows"):
        check(ROUNDING, ROUNDING, overall=0.02)


def test_what_is_no_number_is_beyond_the_bound() -> None:
    with pytest.raises(
        StaleRolloutWeights, match=r"-1\.tiny-server:8000 \(by nan\), and not in those of the other rollout servers"
    ):
        check(ROUNDING, math.nan)


def test_a_completion_is_put_down_to_the_server_of_its_first_turn_as_far_as_that_goes() -> None:
    turns = [[5, 6], [7], [8, 9], [4]]
    whole, longer, another = [5, 6], (7, 1, 1), [9, 8, 9]

    assert attribute([0, 0, 1, 1], turns, [whole, longer, another, [4, 0, 0]]) == [(0, 2), (0, 1), (None, 0), (1, 1)]


def test_no_completion_is_put_down_to_a_server_where_a_turn_was_of_other_prompts() -> None:
    assert attribute([0, 1, 1], [[5], [6], [7]], [[5], [6]]) == [(None, 0), (None, 0)]


@pytest.mark.parametrize(
    ("args", "changing"),
    [
        ({}, []),
        ({"generation_kwargs": {"stop_token_ids": [2], "seed": 1}, "top_k": -1, "min_p": 0.0}, []),
        ({"top_p": 0.95, "vllm_structured_outputs_regex": "[01]+"}, ["top_p", "vllm_structured_outputs_regex"]),
        ({"generation_kwargs": {"seed": 1, "logit_bias": {"5": 1}}}, ["generation_kwargs.logit_bias"]),
    ],
)
def test_arguments_by_which_vllm_samples_from_other_probabilities_are_known(
    args: dict[str, Any], changing: list[str]
) -> None:
    assert find_changing_keys(SimpleNamespace(**DEFAULTS | args)) == changing
