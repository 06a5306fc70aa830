"""Mathematical answers graded by math-verify in the trainer's environment: values, and what happens to processes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.workloads

ROOT = Path(__file__).resolve().parents[2]
THOUGHT = "<think>\nIt may be \\boxed{3}.\n</think>\n\n"
LONG = "a" * 291 + r"\boxed{4}"  # 300 characters

CASES: dict[str, dict[str, Any]] = {
    "right and wrong": {
        "reward": "accuracy",
        "completions": [
            r"\boxed{4}",
            f"{THOUGHT}It is $\\boxed{{\\frac{{8}}{{2}}}}$.",
            [{"role": "assistant", "content": r"\[ x = \boxed{4.0} \]"}],
            r"\boxed{5}",
            f"{THOUGHT}I do not know",  # the box in the reasoning counts, as there is no other
            "4",  # not marked as an answer
            "",
        ],
        "columns": {"solution": ["4", "$4$", 4, "4", "$3$", "4", "4"]},
    },
    "solutions that cannot be parsed": {
        "reward": "accuracy",
        "completions": [r"\boxed{4}"] * 4,
        "columns": {"solution": ["it depends", "", None, "$4$"]},
    },
    "cosine": {
        "reward": "cosine",
        "params": {"max_len": 300},
        "completions": [LONG, LONG, LONG, LONG, LONG + "a" * 300, r"\boxed{4}" + "a" * 141],
        # The third is no LaTeX: open-r1 gives 1.0 for it; here it is read as `accuracy` reads it.
        "columns": {"solution": ["$4$", "$5$", "4", "it depends", "$4$", "$4$"]},
    },
    "length": {
        "reward": "length",
        "completions": [r"\boxed{4}", LONG, r"\boxed{5}", LONG, r"\boxed{4}", LONG],
        "columns": {
            "solution": ["$4$", "$4$", "$4$", "$4$", "it depends", "it depends"],
            "posttrain_row": [0, 0, 1, 1, 2, 2],
        },
    },
    "chinese": {
        "reward": "repetition_penalty",
        "params": {"language": "zh", "ngram_size": 2},
        "completions": ["我们去学校我们去学校", "我们"],
    },
}


@pytest.fixture(scope="module")
def found(trainer_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What grade_cases.py found: one process, as the libraries take a second to import."""
    folder = tmp_path_factory.mktemp("grades")
    (folder / "cases.json").write_text(json.dumps(CASES))
    subprocess.run(
        [
            trainer_python,
            Path(__file__).with_name("grade_cases.py"),
            folder / "cases.json",
            folder / "out.json",
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("operator", "workloads"))},
        check=True,
        timeout=500,
    )
    return json.loads((folder / "out.json").read_text())


def test_an_answer_is_right_if_it_equals_the_solution(found: dict[str, Any]) -> None:
    assert found["right and wrong"] == [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0]


def test_a_solution_that_cannot_be_parsed_gives_no_reward(found: dict[str, Any]) -> None:
    assert found["solutions that cannot be parsed"] == [None, None, None, 1.0]


def test_cosine_grades_and_measures(found: dict[str, Any]) -> None:
    # 300 of 300 characters: the bound of the longest; 600: the same; 150 right ones: half way between 1.0 and 0.5.
    assert found["cosine"] == [
        pytest.approx(0.5),
        pytest.approx(-0.5),
        pytest.approx(0.5),
        None,
        pytest.approx(0.5),
        pytest.approx(0.75),
    ]


def test_length_compares_right_and_wrong_answers_of_a_row(found: dict[str, Any]) -> None:
    # The shortest gets 0.5, but at most 0 if wrong; the longest -0.5.
    assert found["length"] == [0.5, -0.5, 0.0, -0.5, None, None]


def test_chinese_is_split_into_its_words(found: dict[str, Any]) -> None:
    # 我们 去 学校 我们 去 学校: five pairs, of which two are there twice, so 1 - 3/5.
    assert found["chinese"] == [pytest.approx(-0.4), 0.0]


def test_the_process_that_grades_imports_neither_torch_nor_math_verify(found: dict[str, Any]) -> None:
    assert found["imported"] == []


def test_any_number_of_threads_may_grade_at_once(found: dict[str, Any]) -> None:
    assert found["threads"] == [[True, False] * 3 for _ in range(4)]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_answer_that_takes_too_long_is_wrong_and_harms_no_neighbour(found: dict[str, Any], workers: str) -> None:
    assert found["pathological"][workers] == [True, False, False, False, False, True, False]


def test_the_answer_of_a_killed_worker_is_named_and_another_worker_goes_on(found: dict[str, Any]) -> None:
    assert found["killed_worker"] == ["the process that graded it ended by signal 9", "1", [False, True]]


def test_grading_goes_on_after_the_server_of_the_workers_was_killed(found: dict[str, Any]) -> None:
    assert found["killed_server"] == [True, False]


def test_no_grader_outlives_a_process_that_was_killed_while_grading(found: dict[str, Any]) -> None:
    assert found["killed_holder"] == []


def test_a_forked_process_grades_with_processes_of_its_own(found: dict[str, Any]) -> None:
    assert found["forked"] == 0


def test_closing_a_pool_ends_its_processes(found: dict[str, Any]) -> None:
    assert found["closed"] == [[], "the pool of graders is closed"]


def test_the_part_that_is_graded_gives_the_same_answer_as_the_whole_text(found: dict[str, Any]) -> None:
    assert found["shortcuts"] == {"short": 300, "wrong": []}


def test_generated_answers_get_the_grades_of_a_plain_loop(found: dict[str, Any]) -> None:
    assert found["plainly"]["different"] == []
    assert min(found["plainly"]["right"], found["plainly"]["wrong"]) > 100


def test_a_whole_number_is_read_as_latex2sympy_reads_it(found: dict[str, Any]) -> None:
    assert found["numbers"] == []


def test_a_difference_that_is_not_simplified_is_none_that_simplifying_finds_to_be_zero(found: dict[str, Any]) -> None:
    assert found["differences"]["different"] == []
    assert min(found["differences"][kind] for kind in ("zero", "not", "known")) > 80


def test_a_number_that_is_known_not_to_be_zero_is_none_that_simplifying_finds_to_be_zero(found: dict[str, Any]) -> None:
    assert found["numeric_differences"]["different"] == []
    assert min(found["numeric_differences"][kind] for kind in ("zero", "not", "known")) > 80


def test_sympy_is_spared_an_import_only_until_more_is_asked_of_the_module(found: dict[str, Any]) -> None:
    assert found["deferred"] == {
        "before": ["Unimported", "Unimported"],
        "after": ["module", "module"],
        "units": [True, True],
        "tensors": [True],
    }


def test_the_tables_of_the_parser_are_made_once_and_used_by_the_next_process(found: dict[str, Any]) -> None:
    made, used = (found["parser_tables"][name] for name in ("made", "used"))
    assert all(made["parsed"]) and len(made["parsed"]) > 50
    assert made["files"] == ["tables"]
    assert not made["names us"]  # this package need not be on the path of the process that grades
    assert used == made | {"parsed": []}
    assert made["states"] > 300 and made["wrong hashes"] == made["more"] == 0


def test_tables_that_cannot_be_read_are_made_anew(found: dict[str, Any]) -> None:
    assert found["parser_tables"]["mended"] == found["parser_tables"]["made"]


def test_without_a_place_for_the_tables_the_parser_fills_them_as_it_goes(found: dict[str, Any]) -> None:
    told = found["parser_tables"]["not writable"]
    assert told["files"] is None and told["parsed"] == [] and told["more"] > 300
