"""The rewards' formulas, with values worked out by hand; what decides whether an answer is right is a fake here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.api.rewards import REWARDS
from posttrain_workloads import rewards
from posttrain_workloads.rewards import build
from posttrain_workloads.rewards.grading import GradingFailed, share_pool

CODE_REWARDS = {name for name, info in REWARDS.items() if info.needs_sandbox}
GOOD = "<think>\nhm\n</think>\n<answer>\n4\n</answer>"


class Grader:
    """Grades by the solution alone: "right", "wrong", or what cannot be parsed."""

    def grade(self, config: str, golds: Sequence[str], answers: Sequence[str]) -> list[bool | None]:
        for index, gold in enumerate(golds):
            if gold == "fails":
                raise GradingFailed("the process that graded it ended by signal 9", index=index)
        return [{"right": True, "wrong": False}.get(gold) for gold in golds]


@pytest.fixture(autouse=True)
def grader() -> Iterator[None]:
    share_pool(Grader())
    yield
    share_pool(None)


def score(name: str, completions: Sequence[Any], *, params: dict[str, Any] | None = None, **columns: Any) -> list[Any]:
    count = len(completions)
    given = {"prompts": ["p"] * count, "completion_ids": [[]] * count, **columns}
    return build(name, **(params or {}))(completions=completions, **given)


# --- Form -------------------------------------------------------------------------------------------------------------


def test_format_wants_reasoning_and_answer_each_tag_on_its_own_line() -> None:
    completions = [
        GOOD,
        GOOD.replace("\n</think>", "</think>"),
        f"Well. {GOOD}",
        GOOD.replace("<answer>\n", ""),
        GOOD.replace("hm", "hm\n\nhm"),
    ]
    assert score("format", completions) == [1.0, 0.0, 0.0, 0.0, 1.0]


def test_tag_count_gives_a_quarter_for_each_tag_that_stands_once() -> None:
    completions = [
        GOOD,  # all four
        GOOD.removesuffix("\n</answer>"),  # three
        f"<think>\n{GOOD}",  # one stands twice
        GOOD.replace("<answer>\n", "<answer>"),  # one without its line break
        "4",
    ]
    assert score("tag_count", completions) == [1.0, 0.75, 0.75, 0.75, 0.0]


def test_reasoning_steps_gives_a_third_for_each_sign_up_to_three() -> None:
    completions = [
        "Step 1: add. Step 2: divide.",  # 2 / 3
        "First, add.\n- carry\n* done",  # 3 / 3
        "First, Second, Next, Finally, done",  # 4 of 3
        "first, 4",  # capital letters count
        "",
    ]
    assert score("reasoning_steps", completions) == [2 / 3, 1.0, 1.0, 0.0, 0.0]


def test_reasoning_steps_counts_the_numbers_of_all_lines() -> None:
    # open-r1 counts the first one only: 1 / 3.
    assert score("reasoning_steps", ["1. a\n2. b\n3. c", "We go:\n1. a\n2. b", "It is 3. b"]) == [1.0, 2 / 3, 0.0]


def test_code_format_wants_a_block_in_the_rows_language_or_else_in_the_parameters() -> None:
    def completion(language: str) -> str:
        return f"<think>\nhm\n</think>\n<answer>\n```{language}\nx\n```\n</answer>"

    completions = [completion("python"), completion("cpp"), completion("cpp"), GOOD, f"{completion('python')} end"]
    assert score("code_format", completions) == [1.0, 0.0, 0.0, 0.0, 0.0]
    languages = ["cpp", "cpp", None, "python", "python"]
    assert score("code_format", completions, language=languages) == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert score("code_format", completions, params={"language": "cpp"}, language=languages)[2] == 1.0


# --- Length and repetition --------------------------------------------------------------------------------------------


def test_repetition_penalty_is_the_share_of_repeated_ngrams() -> None:
    completions = [
        "a b c d",  # ab, bc, cd: none repeated
        "a a a a",  # aa, aa, aa: 1 - 1/3
        "A b a B",  # ab, ba, ab: 1 - 2/3
        "a",  # no pair at all
        "",
    ]
    expected = [0.0, -2 / 3, -1 / 3, 0.0, 0.0]
    assert score("repetition_penalty", completions, params={"ngram_size": 2}) == pytest.approx(expected)
    halved = score("repetition_penalty", completions, params={"ngram_size": 2, "max_penalty": -0.5})
    assert halved == pytest.approx([value / 2 for value in expected])


def test_a_column_named_as_a_parameter_does_not_change_it() -> None:
    columns = {"language": ["python"], "max_penalty": [7.0]}
    assert score("repetition_penalty", ["a a a a"], params={"ngram_size": 2}, **columns) == pytest.approx([-2 / 3])


def test_soft_overlong_punishment_falls_over_the_last_tokens() -> None:
    # From 80 tokens on (80 - n) / 20, and -1 beyond 100.
    counts = {0: 0.0, 80: 0.0, 85: -0.25, 90: -0.5, 100: -1.0, 101: -1.0, 500: -1.0}
    params = {"max_completion_len": 100, "soft_punish_cache": 20}
    ids = [list(range(count)) for count in counts]
    given = score("soft_overlong_punishment", [""] * len(ids), params=params, completion_ids=ids)
    assert given == list(counts.values())


@pytest.mark.parametrize(
    ("characters", "right", "wrong"),
    [
        (0, 1.0, -1.0),  # cos 0 = 1: the bounds of the shortest
        (50, 0.75, -0.75),  # cos(pi/2) = 0: half way
        (100, 0.5, -0.5),  # cos(pi) = -1: the bounds of the longest
        (150, 0.5, -0.5),  # open-r1 comes back here: 0.75 and -0.75
        (200, 0.5, -0.5),  # and gives 1.0 and -1.0
    ],
)
def test_cosine_moves_between_its_bounds_and_stays_beyond_the_length(
    characters: int, right: float, wrong: float
) -> None:
    given = score(
        "cosine", ["x" * characters] * 3, params={"max_len": 100}, solution=["right", "wrong", "cannot be parsed"]
    )
    assert given == [pytest.approx(right), pytest.approx(wrong), None]


def test_cosine_takes_other_bounds() -> None:
    params = {"min_value_wrong": 0.0, "max_value_wrong": -0.5, "max_value_correct": 2, "max_len": 30}
    # At a third of the length cos(pi/3) = 1/2, so three quarters of the way are left.
    given = score("cosine", ["x" * 10] * 2, params=params, solution=["right", "wrong"])
    assert given == pytest.approx([0.5 + 1.5 * 0.75, -0.5 + 0.5 * 0.75])


def test_length_compares_the_completions_of_a_row() -> None:
    sizes = [10, 20, 30, 10, 30]
    # 0.5 - (L - 10) / 20, and at most 0 where the answer is wrong.
    solution = ["right"] * 3 + ["wrong"] * 2
    given = score("length", ["x" * size for size in sizes], solution=solution, posttrain_row=[0] * 5)
    assert given == [0.5, 0.0, -0.5, 0.0, -0.5]


def test_length_does_not_compare_rows_even_of_the_same_prompt() -> None:
    sizes = [10, 30, 100, 300]
    columns: dict[str, Any] = {"solution": ["right"] * 4}
    completions = ["x" * size for size in sizes]
    assert score("length", completions, **columns, posttrain_row=[0, 0, 1, 1]) == [0.5, -0.5, 0.5, -0.5]
    assert score("length", completions, **columns, prompts=["p", "p", "q", "q"]) == [0.5, -0.5, 0.5, -0.5]
    # Over all four, as in open-r1: 0.5 - (L - 10) / 290.
    together = score("length", completions, **columns)
    assert together == pytest.approx([0.5, 0.5 - 20 / 290, 0.5 - 90 / 290, -0.5])


def test_completions_of_one_length_are_neither_short_nor_long() -> None:
    assert score("length", ["aa", "bb"], solution=["right", "right"]) == [0.0, 0.0]


def test_length_gives_nothing_where_the_solution_cannot_be_parsed() -> None:
    assert score("length", ["a", "bb"], solution=["?", "?"]) == [None, None]
    assert score("length", ["a", "bb"], solution=[None, None]) == [None, None]


@settings(deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=5), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_the_order_of_rows_and_of_the_completions_in_one_changes_no_reward(rows: Any, draw: Any) -> None:
    def rewarded(order: list[tuple[int, list[tuple[int, bool]]]]) -> list[tuple[int, int, bool, float]]:
        flat = [(row, size, right) for row, members in order for size, right in members]
        given = score(
            "length",
            ["x" * size for _, size, _ in flat],
            solution=["right" if right else "wrong" for _, _, right in flat],
            posttrain_row=[row for row, _, _ in flat],
        )
        return sorted((*key, value) for key, value in zip(flat, given, strict=True))

    shuffled = [(row, draw.sample(members, len(members))) for row, members in enumerate(rows)]
    draw.shuffle(shuffled)
    assert rewarded(shuffled) == rewarded(list(enumerate(rows)))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5000), st.sampled_from(["right", "wrong"])), min_size=1))
def test_a_longer_answer_never_gets_more_when_right_nor_less_when_wrong(answers: list[tuple[int, str]]) -> None:
    given = score("cosine", ["x" * size for size, _ in answers], solution=[verdict for _, verdict in answers])
    for verdict, sign in (("right", 1), ("wrong", -1)):
        ordered = sorted(
            (size, sign * value) for (size, mine), value in zip(answers, given, strict=True) if mine == verdict
        )
        values = [value for _, value in ordered]
        assert all(a >= b or math.isclose(a, b) for a, b in itertools.pairwise(values))


# --- Grades -----------------------------------------------------------------------------------------------------------


def test_accuracy_is_one_or_zero_or_nothing() -> None:
    assert score("accuracy", ["a", "b", "c", "d"], solution=["right", "wrong", "?", None]) == [1.0, 0.0, None, None]


@pytest.mark.parametrize("name", ["accuracy", "cosine", "length"])
def test_a_grade_that_fails_names_reward_row_and_completion(name: str) -> None:
    with pytest.raises(rewards.RewardError) as failure:
        score(name, ["one", f"{'x' * 500} the end"], solution=["right", "fails"])
    text = str(failure.value)
    assert text.startswith(
        f"reward {name}, row 1 with the solution 'fails': the process that graded it ended by signal 9; the "
        "completion: '…xxx"
    )
    assert text.endswith("xxx the end'")


# --- What is bound ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(REWARDS.keys() - CODE_REWARDS))
def test_every_reward_is_exported_by_its_name_and_bound_with_the_tables_defaults(name: str) -> None:
    defaults = {param.name: param.default for param in REWARDS[name].params}
    columns = {"solution": ["right"], "completion_ids": [[1] * 13000]}
    text = "1. a a a a a a"
    plain = vars(rewards)[name](["p"], [text], **columns)
    assert build(name)(["p"], [text], **columns) == plain
    assert build(name, **defaults)(["p"], [text], **columns) == plain
    assert build(name).__name__ == name


def test_messages_count_as_the_text_of_the_last_one() -> None:
    messages = [
        [{"role": "assistant", "content": GOOD}],
        [{"role": "assistant", "content": None, "tool_calls": []}, {"role": "tool", "content": "4"}],
        [{"role": "assistant", "content": [{"type": "text", "text": GOOD[:9]}, {"type": "text", "text": GOOD[9:]}]}],
    ]
    assert score("format", messages) == [1.0, 0.0, 1.0]


def test_a_name_or_parameters_that_the_table_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r'^"acuracy" is no reward, did you mean accuracy'):
        build("acuracy")
    with pytest.raises(ValueError, match=r"^cosine: maxlen is no parameter of cosine, did you mean `max_len`"):
        build("cosine", maxlen=5)
    with pytest.raises(ValueError, match=r"^repetition_penalty: max_penalty must be a number of at most 0"):
        build("repetition_penalty", max_penalty=0.1)


def test_a_missing_column_is_named() -> None:
    with pytest.raises(ValueError, match=r"^reward accuracy needs the column solution; there are: answer, level$"):
        score("accuracy", ["4"], answer=["4"], level=[1])


@pytest.mark.parametrize("name", sorted(CODE_REWARDS))
def test_a_reward_that_runs_programs_is_not_built_without_a_sandbox(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} runs programs, and there is no sandbox to run them in"):
        build(name)
