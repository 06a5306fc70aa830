"""The table of rewards: what is said of a name or a parameter that does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.api.rewards import REWARDS, RewardProblem, check_reward, fill_params


def messages(name: str, **params: Any) -> dict[str | None, str]:
    return {problem.param: problem.message for problem in check_reward(name, params)}


@pytest.mark.parametrize("name", REWARDS)
def test_the_defaults_of_a_reward_are_accepted_and_complete(name: str) -> None:
    defaults = {param.name: param.default for param in REWARDS[name].params}
    assert check_reward(name, defaults) == []
    assert fill_params(name, {}) == defaults


def test_an_unknown_reward_is_answered_with_the_nearest_name() -> None:
    [problem] = check_reward("acuracy", {})
    assert problem.param is None
    assert problem.message.startswith('"acuracy" is no reward, did you mean accuracy? The rewards: accuracy, format, ')
    [problem] = check_reward("softOverlongPunishment", {})
    assert "did you mean soft_overlong_punishment?" in problem.message


def test_an_unknown_reward_that_is_near_to_none_is_answered_with_all_names() -> None:
    [problem] = check_reward("xyzzy", {})
    assert problem.message.startswith('"xyzzy" is no reward. The rewards: accuracy, format, tag_count, ')


def test_an_unknown_parameter_is_answered_with_the_nearest_one() -> None:
    assert messages("cosine", maxLen=5) == {
        "maxLen": "is no parameter of cosine, did you mean `max_len`? Valid are: min_value_wrong, max_value_wrong, "
        "min_value_correct, max_value_correct and max_len"
    }
    assert messages("repetition_penalty", x=1) == {
        "x": "is no parameter of repetition_penalty; valid are: ngram_size, max_penalty and language"
    }
    assert messages("format", strict=True) == {"strict": "is no parameter of format, which has none: leave it out"}


def test_a_penalty_above_zero_is_answered_with_the_negative_one() -> None:
    assert messages("repetition_penalty", max_penalty=0.5) == {
        "max_penalty": "must be a number of at most 0, not the number 0.5: a penalty is added to the reward, so write "
        "-0.5 (default: -1.0)"
    }


def test_a_value_of_a_wrong_type_is_answered_with_the_right_one() -> None:
    assert messages("cosine", max_len="1000", min_value_wrong=True) == {
        "max_len": 'must be an integer from 1 to 10000000, not the string "1000": write it without quotes '
        "(default: 1000)",
        "min_value_wrong": "must be a number, not true (default: -1.0)",
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused(value: float) -> None:
    assert messages("cosine", max_value_wrong=value) == {
        "max_value_wrong": "must be a number, not a number that is not finite (default: -0.5)"
    }


def test_an_unknown_language_is_answered_with_the_known_ones() -> None:
    assert messages("code_format", language="Python") == {
        "language": 'must be one of "python", "javascript", "r", "java", "bash" or "cpp", not the string "Python": did '
        'you mean "python"? (default: "python")'
    }
    assert messages("repetition_penalty", language="fr") == {
        "language": 'must be one of "en" or "zh", not the string "fr" (default: "en")'
    }


def test_all_problems_of_a_reward_are_told_at_once() -> None:
    assert list(messages("repetition_penalty", ngram_size=0, max_penalty=1, languages="en")) == [
        "ngram_size",
        "max_penalty",
        "languages",
    ]


def test_a_soft_window_longer_than_the_completion_is_refused() -> None:
    assert check_reward("soft_overlong_punishment", {"max_completion_len": 1024}) == [
        RewardProblem("soft_punish_cache", "must be at most max_completion_len (1024), not 4096")
    ]


@pytest.mark.parametrize("name", ["ioi_code", "cf_code"])
def test_tests_run_one_by_one_or_some_or_all_at_once_but_never_none(name: str) -> None:
    assert [check_reward(name, {"test_batch_size": size}) for size in (1, 3, -1)] == [[], [], []]
    assert messages(name, test_batch_size=0) == {
        "test_batch_size": "must be at least 1, or -1 for all tests at once, not 0"
    }
    assert "test_batch_size" in messages(name, test_batch_size=-2)


def test_an_integer_is_a_float_where_a_number_is_due() -> None:
    filled = fill_params("repetition_penalty", {"max_penalty": -1, "ngram_size": 2})
    assert filled == {"ngram_size": 2, "max_penalty": -1.0, "language": "en"}
    assert type(filled["max_penalty"]) is float
