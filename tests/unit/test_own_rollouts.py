"""An own rollout function as the trainer calls it: what it may return, and what is said of anything else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.contract.result import ExitCode
from posttrain_workloads.own_rollouts import RolloutFunction
from posttrain_workloads.runtime import RankFailure

PROMPTS = ["a", "a"]
GOOD = {"prompt_ids": [[1], [1]], "completion_ids": [[2, 3], [4]], "logprobs": [[-0.5, -1.0], [-2.0]]}


def build_trainer(*, vllm: bool = False, correction: bool = True) -> Any:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=10))
    model = SimpleNamespace(config=config)
    return SimpleNamespace(model=model, use_vllm=vllm, vllm_importance_sampling_correction=correction)


def call(returned: Any, **trainer: bool) -> dict[str, Any]:
    return RolloutFunction("mine:turns", lambda prompts, trainer: returned)(PROMPTS, build_trainer(**trainer))


class Token:
    """As a tensor's or an array's element is one."""

    def __index__(self) -> int:
        return 7


def test_a_rollout_is_handed_on_as_lists_of_plain_numbers() -> None:
    returned = {
        "prompt_ids": ((1,), [Token()]),
        "completion_ids": [(2, 3), [Token()]],
        "logprobs": [[-0.5, None], [-1]],
        "env_mask": [[1, False], (True,)],
        "turns": (1, 2),
    }

    assert call(returned, vllm=True) == {
        "prompt_ids": [[1], [7]],
        "completion_ids": [[2, 3], [7]],
        "logprobs": [[-0.5, None], [-1.0]],
        "env_mask": [[1, 0], [1]],
        "turns": [1, 2],
    }


@pytest.mark.parametrize("trainer", [{"vllm": False}, {"vllm": True, "correction": False}])
def test_log_probabilities_can_be_left_out_where_nothing_is_compared_with_them(trainer: dict[str, bool]) -> None:
    assert call({**GOOD, "logprobs": None}, **trainer)["logprobs"] is None


BAD: list[tuple[Any, str]] = [
    ([], "a list: it must return a dict with prompt_ids, completion_ids and logprobs"),
    ({}, "no prompt_ids, completion_ids and logprobs, but nothing"),
    ({"prompt_ids": [], "ids": []}, "no completion_ids and logprobs, but prompt_ids and ids: it must return a dict"),
    ({**GOOD, "completion_ids": [[2, 3]] * 4}, "4 completion_ids for 2 prompts: one for each, since a prompt is there"),
    ({**GOOD, "completion_ids": "ab"}, "a str as completion_ids: it must be a list with an entry for each prompt"),
    ({**GOOD, "completion_ids": [[2, 3], 4]}, "a int as completion_ids[1]: it must be a list"),
    ({**GOOD, "completion_ids": [[2, 3], ["x"]]}, "'x' in completion_ids[1]: it takes token ids"),
    ({**GOOD, "completion_ids": [[2, 3], []]}, "nothing in completion_ids[1]: there must be a token at least"),
    ({**GOOD, "prompt_ids": [[1], [10]]}, "10 in prompt_ids[1], and the model has the tokens 0 to 9"),
    ({**GOOD, "logprobs": [[-0.5], [-2.0]]}, "1 values in logprobs[0] for the 2 tokens of completion_ids[0]: one for"),
    ({**GOOD, "logprobs": [[[-0.5], [-1.0]], [[-2.0]]]}, "[-0.5] in logprobs[0]: it takes the log-probability of the"),
    ({**GOOD, "logprobs": None}, "no logprobs, with which the trainer corrects what vLLM samples otherwise than it"),
    ({**GOOD, "env_mask": [[1, 2], [1]]}, "2 in env_mask[0]: it takes 1, or 0 for a token not from the model"),
    ({**GOOD, "env_mask": [[1, 1], [1, 1]]}, "2 values in env_mask[1] for the 1 tokens of completion_ids[1]"),
    ({**GOOD, "turns": [1]}, "1 turns for 2 prompts"),
    ({**GOOD, "turns": 1}, "a int as turns: it must be a list with an entry for each prompt"),
    ({**GOOD, "posttrain_row": [0, 1]}, "posttrain_row, which rewards get from elsewhere: give the field another name"),
]  # fmt: skip


@pytest.mark.parametrize(("returned", "said"), BAD, ids=[said[:40] for _, said in BAD])
def test_what_cannot_be_trained_on_is_the_users_error_and_told_with_its_place(returned: Any, said: str) -> None:
    with pytest.raises(RankFailure) as failed:
        call(returned, vllm=True)

    assert (failed.value.reason, failed.value.exit_code) == ("RolloutFunctionFailed", ExitCode.INVALID)
    assert str(failed.value).startswith(f"spec.grpo.rolloutFunction: mine:turns returns {said}")


def test_an_error_in_the_function_is_told_with_the_lines_that_it_comes_from() -> None:
    def turns(prompts: list[str], trainer: Any) -> None:
        raise KeyError("question")

    with pytest.raises(RankFailure) as failed:
        RolloutFunction("mine:turns", turns)(PROMPTS, build_trainer())

    assert (failed.value.reason, failed.value.exit_code) == ("RolloutFunctionFailed", ExitCode.FAILED)
    first, *lines = str(failed.value).splitlines()
    assert first == "spec.grpo.rolloutFunction: mine:turns fails on 2 prompts:"
    assert lines[-1] == "KeyError: 'question'"
    assert 'raise KeyError("question")' in lines[-2]


@pytest.mark.parametrize("error", [MemoryError(), RankFailure("ServerLost", "gone", exit_code=ExitCode.TRANSIENT)])
def test_an_error_with_a_reason_of_its_own_keeps_it(error: Exception) -> None:
    def turns(prompts: list[str], trainer: Any) -> None:
        raise error

    with pytest.raises(type(error)) as failed:
        RolloutFunction("mine:turns", turns)(PROMPTS, build_trainer())

    assert failed.value is error
