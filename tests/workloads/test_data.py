"""Mixtures: which rows they hold, in which order, in which format; and what is said of data that does not fit."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.workloads._prepare_configs import build_case_config, run_cases, write_jsonl

pytestmark = pytest.mark.workloads

WRITE_PARQUET = """
import json, sys
import pyarrow, pyarrow.parquet

pyarrow.parquet.write_table(pyarrow.Table.from_pylist(json.load(sys.stdin)), sys.argv[1])
"""


def pairs(count: int, *, base: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": str(base + n), "completion": str(base + n), "extra": n} for n in range(count)]


def conversations(count: int, *, base: int = 0) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": str(base + n)}]} for n in range(count)]


@pytest.fixture(scope="module")
def found(trainer_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every mixture holds, by its name."""
    folder = tmp_path_factory.mktemp("data")

    def jsonl(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"source": f"file://{write_jsonl(folder / f'{name}.jsonl', rows)}"}

    def case(name: str, *members: dict[str, Any], **more: Any) -> dict[str, Any]:
        config = build_case_config(model="file:///nowhere", datasets=members, **more)
        return {"name": name, "what": "data", "config": config}

    ten, five = jsonl("ten", pairs(10)), jsonl("five", pairs(5, base=100))
    (folder / "table.csv").write_text("")
    (folder / "empty.jsonl").write_text("")
    (folder / "blank.jsonl").write_text("\n")
    (folder / "sums.csv").write_text("prompt,completion\n1 + 1 =,2\n2 + 2 =,4\n")
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text"])
        writer.writeheader()
        writer.writerows({"text": f"line {n}"} for n in range(3))
    (folder / "array.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}]))
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "notes.txt").write_text("a")
    (folder / "empty").mkdir()
    write_jsonl(folder / "shards" / "b" / "2.jsonl", conversations(2, base=10))
    write_jsonl(folder / "shards" / "1.jsonl", conversations(2))
    write_jsonl(folder / "mixed" / "1.jsonl", conversations(2))
    (folder / "mixed" / "2.csv").write_text("text\na\n")
    subprocess.run(
        [trainer_python, "-c", WRITE_PARQUET, folder / "talk.parquet"],
        input=json.dumps(conversations(3)),
        text=True,
        check=True,
    )

    def at(path: str) -> dict[str, Any]:
        return {"source": f"file://{folder}/{path}"}

    sharegpt = jsonl(
        "sharegpt",
        [
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                ],
                "system": "unused",
            },
            {"conversations": [{"from": "human", "value": "Yo"}, {"from": "gpt", "value": "Hey"}], "system": ""},
        ],
    )
    roles = [{"dialogue": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    chat_pairs = [
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    ]
    cases = [
        case("fractions", {**ten, "fraction": "0.5"}, {**five, "fraction": "0.5"}, datasetSeed=3),
        case("the same again", {**ten, "fraction": "0.5"}, {**five, "fraction": "0.5"}, datasetSeed=3),
        case("another seed", {**ten, "fraction": "0.5"}, {**five, "fraction": "0.5"}, datasetSeed=4),
        case("exact fraction", {**jsonl("hundred", pairs(100)), "fraction": "0.29"}),
        case("rows", {**ten, "rows": {"start": 2, "end": 5}}),
        case("rows beyond", {**ten, "rows": {"start": 10}}),
        case("no row left", {**ten, "fraction": "0.01"}),
        case("test fraction", ten, testFraction="0.25"),
        case("evaluation", ten, evalDatasets=[five]),
        case("all held out", ten, testFraction="1"),
        case("renamed", {**jsonl("qa", [{"q": "a", "a": "b"}]), "rename": {"q": "prompt", "a": "completion"}}),
        case("renamed twice", {**ten, "rename": {"extra": "prompt"}}),
        case("rename of nothing", {**ten, "rename": {"promt": "text"}}),
        case("columns differ", ten, {**five, "columns": ["prompt", "completion"]}),
        case(
            "types differ",
            jsonl("numbers", [{"text": "a", "tools": 1}]),
            jsonl("words", [{"text": "a", "tools": "b"}]),
        ),
        case("formats differ", ten, evalDatasets=[jsonl("talk", conversations(3))]),
        case("sharegpt", sharegpt),
        case("sharegpt with a system prompt", sharegpt, systemPrompt="Think."),
        case(
            "sharegpt and messages",
            {**sharegpt, "columns": ["messages"], "rename": {"conversations": "messages"}},
            jsonl("plain", conversations(1)),
        ),
        case("unknown role", jsonl("odd", [{"conversations": [{"from": "narrator", "value": "Once"}]}])),
        case("system prompt", jsonl("two", conversations(2)), systemPrompt="Think."),
        case("system prompt before text", at("table.csv"), systemPrompt="Think."),
        case("system prompt before prompts", jsonl("chat-pairs", chat_pairs), systemPrompt="Think."),
        case("messages under another name", jsonl("roles", roles)),
        case("messages renamed", {**jsonl("roles2", roles), "rename": {"dialogue": "messages"}}),
        case("messages beside a prompt", jsonl("both", [{**row, "prompt": "p"} for row in conversations(2)])),
        case("no format", jsonl("problems", [{"problem": "1 + 1", "solution": "2", "level": 3}])),
        case("own text column", jsonl("body", [{"body": "a"}]), args={"dataset_text_field": "body"}),
        case("csv", at("table.csv")),
        case("json array", at("array.json")),
        case("parquet", at("talk.parquet")),
        case("folder", at("shards")),
        case("folder of two kinds", at("mixed")),
        case("empty folder", at("empty")),
        case("wrong kind", at("notes.txt")),
        case("broken", at("broken.jsonl")),
        case("empty file", at("empty.jsonl")),
        case("only a line break", at("blank.jsonl")),
        case("numbers in a table", at("sums.csv")),
        case("split of a path", {**ten, "split": "test"}),
        case("several", at("no.jsonl"), {**ten, "columns": ["a"]}, evalDatasets=[at("neither.csv")]),
    ]
    return run_cases(cases, python=trainer_python, folder=folder / "run")


def prompts(found: dict[str, Any], name: str) -> list[int]:
    assert found[name]["problems"] == []
    return [int(row["prompt"]) for row in found[name]["train"]]


def the_problem(found: dict[str, Any], name: str) -> str:
    [problem] = found[name]["problems"]
    return str(problem)


def test_a_mixture_takes_a_share_of_each_member_and_shuffles_all(found: dict[str, Any]) -> None:
    taken = prompts(found, "fractions")
    assert sorted(n >= 100 for n in taken) == [False] * 5 + [True] * 2
    assert taken != sorted(taken)
    assert [used for _, _, used in found["fractions"]["members"]] == [5, 2]


def test_a_mixture_is_the_same_each_time_and_another_with_another_seed(found: dict[str, Any]) -> None:
    assert prompts(found, "the same again") == prompts(found, "fractions")
    assert prompts(found, "another seed") != prompts(found, "fractions")


def test_a_fraction_is_taken_of_the_decimal_that_was_written(found: dict[str, Any]) -> None:
    """0.29 as a binary number would give 28."""
    assert len(prompts(found, "exact fraction")) == 29


def test_rows_are_a_range_before_everything_else(found: dict[str, Any]) -> None:
    assert sorted(prompts(found, "rows")) == [2, 3, 4]
    assert the_problem(found, "rows beyond").startswith("DatasetEmpty: spec.datasets[0]: ")
    assert "fraction 0.01 of 10 rows" in the_problem(found, "no row left")


def test_rows_are_held_out_by_share_or_by_name(found: dict[str, Any]) -> None:
    split = found["test fraction"]
    everything = [row["prompt"] for row in (*split["train"], *split["test"])]
    assert (len(split["train"]), len(split["test"])) == (7, 3)
    assert sorted(everything, key=int) == [str(n) for n in range(10)]
    assert len(found["evaluation"]["train"]) == 10
    assert {row["prompt"] for row in found["evaluation"]["test"]} == {str(n) for n in range(100, 105)}
    assert "leaves none to train on" in the_problem(found, "all held out")


def test_columns_are_renamed_and_others_left_out(found: dict[str, Any]) -> None:
    assert found["renamed"]["train"] == [{"prompt": "a", "completion": "b"}]
    assert "two columns prompt" in the_problem(found, "renamed twice")
    assert "did you mean prompt?" in the_problem(found, "rename of nothing")


def test_members_with_other_columns_are_both_named_with_the_fix(found: dict[str, Any]) -> None:
    problem = the_problem(found, "columns differ")
    assert problem.startswith("DatasetColumnsDiffer: spec.datasets[0] has the columns completion, extra, prompt; ")
    assert "spec.datasets[1] has completion, prompt" in problem
    assert "spec.datasets[].columns: [prompt, completion]" in problem


def test_columns_with_other_types_or_formats_are_refused(found: dict[str, Any]) -> None:
    assert "with other types" in the_problem(found, "types differ")
    problem = the_problem(found, "formats differ")
    assert "spec.evalDatasets[0] holds conversations in messages" in problem
    assert "spec.datasets[0] holds text in prompt and completion" in problem


def test_sharegpt_becomes_messages(found: dict[str, Any]) -> None:
    rows = found["sharegpt"]["train"]
    assert {"messages": [{"role": "user", "content": "Yo"}, {"role": "assistant", "content": "Hey"}]} in rows
    longest = max((row["messages"] for row in rows), key=len)
    assert [turn["role"] for turn in longest] == ["system", "user", "assistant"]
    assert "'narrator'" in the_problem(found, "unknown role")


def test_members_in_both_notations_of_conversations_mix(found: dict[str, Any]) -> None:
    both = found["sharegpt and messages"]
    assert both["problems"] == []
    assert len(both["train"]) == 3
    assert all(set(turn) == {"role", "content"} for row in both["train"] for turn in row["messages"])


def test_a_system_prompt_stands_before_conversations_that_have_none(found: dict[str, Any]) -> None:
    firsts = sorted(row["messages"][0]["content"] for row in found["sharegpt with a system prompt"]["train"])
    assert firsts == ["Be brief.", "Think."]
    assert all(row["messages"][0] == {"role": "system", "content": "Think."} for row in found["system prompt"]["train"])
    [pair] = found["system prompt before prompts"]["train"]
    assert [turn["role"] for turn in pair["prompt"]] == ["system", "user"]
    assert [turn["role"] for turn in pair["completion"]] == ["assistant"]
    assert the_problem(found, "system prompt before text").startswith("ConfigInvalid: spec.systemPrompt: ")


def test_messages_go_before_other_columns_that_trl_would_take_for_a_format(found: dict[str, Any]) -> None:
    assert all(set(row) == {"messages"} for row in found["messages beside a prompt"]["train"])


def test_columns_without_a_format_are_listed_with_what_would_do(found: dict[str, Any]) -> None:
    problem = the_problem(found, "no format")
    assert "problem (text), solution (text), level" in problem
    assert "rename: {problem: prompt, solution: completion}" in problem
    assert "rename: {dialogue: messages}" in the_problem(found, "messages under another name")
    assert found["messages renamed"]["problems"] == []


def test_the_text_column_may_have_another_name(found: dict[str, Any]) -> None:
    assert found["own text column"]["train"] == [{"body": "a"}]


def test_files_and_folders_of_each_kind_are_read(found: dict[str, Any]) -> None:
    assert len(found["csv"]["train"]) == 3
    assert len(found["json array"]["train"]) == 2
    assert {row["messages"][0]["content"] for row in found["parquet"]["train"]} == {"0", "1", "2"}
    assert {row["messages"][0]["content"] for row in found["folder"]["train"]} == {"0", "1", "10", "11"}


def test_files_that_cannot_be_read_are_told_of(found: dict[str, Any]) -> None:
    assert "several kinds (csv, json)" in the_problem(found, "folder of two kinds")
    assert "holds no JSON, JSONL, Parquet or CSV file" in the_problem(found, "empty folder")
    assert "notes.txt" in the_problem(found, "wrong kind")
    assert "cannot be read as JSON" in the_problem(found, "broken")
    assert "for datasets on the Hub" in the_problem(found, "split of a path")
    assert "there is nothing in" in the_problem(found, "empty file")
    assert "blank.jsonl cannot be read as JSON" in the_problem(found, "only a line break")
    assert "completion holds numbers: write JSON Lines" in the_problem(found, "numbers in a table")


def test_the_problems_of_all_members_come_at_once(found: dict[str, Any]) -> None:
    places = [problem.split(": ")[1] for problem in found["several"]["problems"]]
    assert places == ["spec.datasets[0]", "spec.datasets[1].columns", "spec.evalDatasets[0]"]
