"""The rewards of the registry, as a table: what each gives, its parameters, and what it needs.

It owns how a reward's name and parameters are checked without importing the rewards themselves; it must not compute any
reward: `posttrain_workloads.rewards` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.api.spelling import describe_value, join_names, nearest, write_value

CODE_LANGUAGES = ("python", "javascript", "r", "java", "bash", "cpp")
"""The languages that a block of code in an answer can be marked with."""

SCORING_MODES = ("pass_fail", "partial", "weighted_sum")


@dataclass(frozen=True, kw_only=True)
class RewardParam:
    """A parameter of a reward; the bounds are allowed themselves, and a `minimum` has a `maximum` beside it."""

    name: str
    type: Literal["integer", "number", "string"]
    default: int | float | str
    description: str
    choices: tuple[str, ...] = ()
    minimum: int | None = None
    maximum: int | None = None

    @property
    def expected(self) -> str:
        """What the parameter takes, in words."""
        if self.choices:
            return f"one of {join_names([write_value(choice) for choice in self.choices], conjunction='or')}"
        words = {"integer": "an integer", "number": "a number", "string": "a string"}[self.type]
        if self.minimum is not None and self.maximum is not None:
            return f"{words} from {self.minimum} to {self.maximum}"
        return words if self.maximum is None else f"{words} of at most {self.maximum}"


@dataclass(frozen=True, kw_only=True)
class RewardInfo:
    """A reward of the registry."""

    name: str
    description: str
    params: tuple[RewardParam, ...] = ()
    columns: tuple[str, ...] = ()
    """The columns that the dataset must have."""
    optional_columns: tuple[str, ...] = ()
    """The columns that the reward looks at where the dataset has them."""
    compares_group: bool = False
    """It compares the completions of one prompt, so every rank must hold whole groups of them."""
    needs_sandbox: bool = False
    """It runs code out of the completions."""
    differences: tuple[str, ...] = ()
    """Where it gives something else than open-r1's reward of the same name."""


@dataclass(frozen=True)
class RewardProblem:
    """What is wrong with a reward; the message follows the path of `name`, or of `params.<param>`."""

    param: str | None
    message: str


_MAX_LENGTH = 10_000_000
_BARE_SOLUTION = (
    "a solution without LaTeX, as a bare 6, is read as by accuracy, and not left as one that cannot be parsed"
)
_ONE_SECOND = (
    "an answer has a second of processor time in all, however busy the machine, not three seconds for reading it and "
    "three for comparing it"
)
_TEST_BATCH_SIZE = RewardParam(
    name="test_batch_size",
    type="integer",
    default=1,
    minimum=-1,
    maximum=10_000,
    description="How many tests run at the same time before the next ones are begun; -1 runs all at once.",
)

REWARDS: Mapping[str, RewardInfo] = {
    info.name: info
    for info in (
        RewardInfo(
            name="accuracy",
            description="1 if the answer is mathematically equal to the solution, else 0; nothing where the solution "
            "cannot be parsed.",
            columns=("solution",),
            differences=(_ONE_SECOND,),
        ),
        RewardInfo(
            name="format",
            description="1 if the completion is reasoning between `<think>` and `</think>` and then an answer between "
            "`<answer>` and `</answer>`, each tag on a line of its own, else 0.",
        ),
        RewardInfo(
            name="tag_count",
            description="A quarter for each of the four tags `<think>`, `</think>`, `<answer>` and `</answer>` that "
            "stands exactly once, with its line breaks.",
        ),
        RewardInfo(
            name="reasoning_steps",
            description="A third for each sign of a step (`Step 1:`, a numbered or a bulleted line, `First,`, "
            "`Second,`, `Next,`, `Finally,`), at most 1.",
            differences=("a number counts at the begin of each line, not only of the first",),
        ),
        RewardInfo(
            name="length",
            description="From 0.5 for the shortest completion of a prompt to -0.5 for its longest one, in characters; "
            "a wrong answer gets at most 0.",
            columns=("solution",),
            compares_group=True,
            differences=(
                "completions are compared with those of the same row, not with all that are rewarded at the same time",
                "a solution that cannot be parsed gives nothing, not the reward of a right answer",
                _BARE_SOLUTION,
                _ONE_SECOND,
            ),
        ),
        RewardInfo(
            name="cosine",
            description="A bound that falls with the length of a right answer and rises with that of a wrong one, "
            "along half a cosine up to `max_len` characters.",
            columns=("solution",),
            params=(
                RewardParam(
                    name="min_value_wrong",
                    type="number",
                    default=-1.0,
                    description="What the shortest wrong answer gets.",
                ),
                RewardParam(
                    name="max_value_wrong",
                    type="number",
                    default=-0.5,
                    description="What the longest wrong answer gets.",
                ),
                RewardParam(
                    name="min_value_correct",
                    type="number",
                    default=0.5,
                    description="What the longest right answer gets.",
                ),
                RewardParam(
                    name="max_value_correct",
                    type="number",
                    default=1.0,
                    description="What the shortest right answer gets.",
                ),
                RewardParam(
                    name="max_len",
                    type="integer",
                    default=1000,
                    minimum=1,
                    maximum=_MAX_LENGTH,
                    description="The number of characters beyond which length changes nothing more.",
                ),
            ),
            differences=(
                "it stays at its bound beyond max_len, where the curve comes back, to the full reward at twice that",
                "min_value_wrong is -1.0 by default, as documented there, not 0.0",
                "a solution that cannot be parsed gives nothing, not 1.0",
                _BARE_SOLUTION,
                _ONE_SECOND,
            ),
        ),
        RewardInfo(
            name="repetition_penalty",
            description="`max_penalty` times the share of the completion's n-grams that repeat another one.",
            params=(
                RewardParam(
                    name="ngram_size",
                    type="integer",
                    default=3,
                    minimum=1,
                    maximum=1000,
                    description="How many words in a row make an n-gram.",
                ),
                RewardParam(
                    name="max_penalty",
                    type="number",
                    default=-1.0,
                    maximum=0,
                    description="What a completion that only repeats itself would get.",
                ),
                RewardParam(
                    name="language",
                    type="string",
                    default="en",
                    choices=("en", "zh"),
                    description="How words are told apart: by blanks, or by a dictionary of Chinese.",
                ),
            ),
        ),
        RewardInfo(
            name="code_format",
            description="1 if the completion has the tags of `format` and in its answer a block of code marked with "
            "the language, else 0.",
            optional_columns=("language",),
            params=(
                RewardParam(
                    name="language",
                    type="string",
                    default="python",
                    choices=CODE_LANGUAGES,
                    description="The language of the rows that name none in a column `language`.",
                ),
            ),
        ),
        RewardInfo(
            name="soft_overlong_punishment",
            description="0 up to `max_completion_len - soft_punish_cache` tokens, from there falling in a straight "
            "line to -1 at `max_completion_len`, and -1 beyond.",
            params=(
                RewardParam(
                    name="max_completion_len",
                    type="integer",
                    default=16384,
                    minimum=1,
                    maximum=_MAX_LENGTH,
                    description="The number of tokens from which on a completion gets -1.",
                ),
                RewardParam(
                    name="soft_punish_cache",
                    type="integer",
                    default=4096,
                    minimum=1,
                    maximum=_MAX_LENGTH,
                    description="The number of tokens before it over which the penalty grows.",
                ),
            ),
        ),
        RewardInfo(
            name="code",
            description="The share of the row's tests that the program in the completion passes.",
            columns=("verification_info",),
            needs_sandbox=True,
            differences=(
                "the program runs in the row's language, not always in Python, and its block may be marked with any of "
                "the language's names, such as py or c++",
                "the whole output is compared, not the lines that both have",
                "a test that takes too long fails alone, and not all tests with it",
                "a sandbox that does not answer gives nothing, not 0",
            ),
        ),
        RewardInfo(
            name="binary_code",
            description="1 if the program in the completion passes all of the row's tests, else 0.",
            columns=("verification_info",),
            needs_sandbox=True,
            differences=("as code",),
        ),
        RewardInfo(
            name="ioi_code",
            description="The score of the C++ program in the completion on a subtask of the International Olympiad in "
            "Informatics: the lowest over its tests.",
            columns=(
                *("id", "test_names", "test_cases", "grader_files", "time_limit", "memory_limit"),
                "score_precision",
            ),
            params=(_TEST_BATCH_SIZE,),
            needs_sandbox=True,
            differences=(
                "a test_batch_size of -1 runs all tests at once, not none",
                "a sandbox that does not answer gives nothing, not 0",
            ),
        ),
        RewardInfo(
            name="cf_code",
            description="The score of the program in the completion on the tests of a Codeforces problem; -1 without "
            "a program, -0.1 where it does not compile.",
            columns=("language", "official_tests", "time_limit", "memory_limit", "input_mode"),
            optional_columns=(
                *("id", "contest_id", "generated_checker", "generated_tests"),
                "official_tests_complete",
            ),
            params=(
                _TEST_BATCH_SIZE,
                RewardParam(
                    name="scoring_mode",
                    type="string",
                    default="weighted_sum",
                    choices=SCORING_MODES,
                    description="All tests or nothing, the share of passed tests, or both: 1 for all, and a tenth of "
                    "the share.",
                ),
            ),
            needs_sandbox=True,
            differences=("a sandbox that does not answer gives nothing, and does not fail the test",),
        ),
    )
}


def check_reward(name: str, params: Mapping[str, Any]) -> list[RewardProblem]:
    """Return every problem of a reward's name and parameters, in their order."""
    info = REWARDS.get(name)
    if info is None:
        near = nearest(name, REWARDS)
        hint = f", did you mean {near}?" if near else "."
        return [RewardProblem(None, f'"{name}" is no reward{hint} The rewards: {join_names(list(REWARDS))}')]
    known = {param.name: param for param in info.params}
    problems = []
    for key, value in params.items():
        if key not in known:
            problems.append(RewardProblem(key, _explain_unknown(key, info)))
        elif not _accepts(known[key], value):
            problems.append(RewardProblem(key, _explain_value(known[key], value)))
    if not problems and name in _RULES:
        problems += _RULES[name](fill_params(name, params))
    return problems


def fill_params(name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return all parameters of a reward, defaults included, integers as floats where a number is due.

    The name and `params` must be without problems (`check_reward`).
    """
    filled = {param.name: params.get(param.name, param.default) for param in REWARDS[name].params}
    numbers = {param.name for param in REWARDS[name].params if param.type == "number"}
    return {key: float(value) if key in numbers else value for key, value in filled.items()}


def _accepts(param: RewardParam, value: Any) -> bool:
    match param.type:
        case "string":
            return isinstance(value, str) and (not param.choices or value in param.choices)
        case "integer":
            right = type(value) is int
        case "number":
            right = type(value) is int or (type(value) is float and math.isfinite(value))
    low, high = param.minimum, param.maximum
    return right and (low is None or value >= low) and (high is None or value <= high)


def _explain_unknown(key: str, info: RewardInfo) -> str:
    if not info.params:
        return f"is no parameter of {info.name}, which has none: leave it out"
    names = [param.name for param in info.params]
    near = nearest(key, names)
    hint = f", did you mean `{near}`? Valid" if near else "; valid"
    return f"is no parameter of {info.name}{hint} are: {join_names(names)}"


def _explain_value(param: RewardParam, value: Any) -> str:
    if type(value) is float and not math.isfinite(value):
        return f"must be {param.expected}, not a number that is not finite (default: {write_value(param.default)})"
    text = f"must be {param.expected}, not {describe_value(value)}"
    return f"{text}{_hint(param, value)} (default: {write_value(param.default)})"


def _hint(param: RewardParam, value: Any) -> str:
    """Return what to change, where the likely slip is known."""
    if isinstance(value, str):
        near = nearest(value, param.choices)
        if near is not None:
            return f": did you mean {write_value(near)}?"
        return ": write it without quotes" if param.type != "string" and _is_number(value) else ""
    if type(value) in {int, float} and param.maximum == 0 and value > 0:
        return f": a penalty is added to the reward, so write {write_value(-value)}"
    return ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# --- Rules between the parameters -------------------------------------------------------------------------------------


def _cache_within_length(params: Mapping[str, Any]) -> list[RewardProblem]:
    cache, length = params["soft_punish_cache"], params["max_completion_len"]
    if cache <= length:
        return []
    return [RewardProblem("soft_punish_cache", f"must be at most max_completion_len ({length}), not {cache}")]


def _batch_of_tests(params: Mapping[str, Any]) -> list[RewardProblem]:
    if params["test_batch_size"] != 0:
        return []
    return [RewardProblem("test_batch_size", "must be at least 1, or -1 for all tests at once, not 0")]


_RULES: Mapping[str, Callable[[Mapping[str, Any]], list[RewardProblem]]] = {
    "soft_overlong_punishment": _cache_within_length,
    "ioi_code": _batch_of_tests,
    "cf_code": _batch_of_tests,
}
