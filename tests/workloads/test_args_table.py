"""The tables of training arguments against the real classes of TRL, in the trainer's environment."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from posttrain.api.args import ArgKey, check_args, coerce_args, load_table
from posttrain.api.methods import METHODS

pytestmark = pytest.mark.workloads

ROOT = Path(__file__).resolve().parents[2]
TABLES = {name: load_table(name) for name in METHODS.values()}
FREE_KEYS = {(name, key): row for name, table in TABLES.items() for key, row in table.keys.items() if row.owned is None}

# What a value needs beside it, and values that do not follow from the type alone.
COMPANIONS: dict[str, dict[str, Any]] = {
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "lr_scheduler_type": {"eval_strategy": "epoch"},  # reduce_lr_on_plateau and greedy look at the evaluation
}
SAMPLES: dict[str, list[Any]] = {
    "accelerator_config": [{"split_batches": True}],  # a string is the path of a file
    "debug": ["underflow_overflow", ["underflow_overflow"]],
    "include_num_input_tokens_seen": ["all", "non_padding", True],
    "pad_to_multiple_of": [8, "auto"],
    "generation_batch_size": [8],
    "num_generations": [8],
    "num_generations_eval": [8],
    "per_device_train_batch_size": [8],  # a rollout holds whole groups
    "steps_per_generation": [2],
    "tf32": [False],  # true needs an Ampere GPU
}
WRONG: dict[str, Any] = {
    "array": {},
    "boolean": "true",
    "integer": "3",
    "null": [],
    "number": "1e-5",
    "object": [],
    "string": [],
}


@dataclass(frozen=True)
class Case:
    """One right value of one key of one table."""

    table: str
    key: str
    value: Any

    @property
    def args(self) -> dict[str, Any]:
        return COMPANIONS.get(self.key, {}) | {self.key: self.value}


def samples_of(schema: Any) -> list[Any]:
    """Return values that the type in the table allows: every choice, and one value of each other kind."""
    if "anyOf" in schema:
        return [value for member in schema["anyOf"] for value in samples_of(member)]
    if "enum" in schema:
        return list(schema["enum"])
    match schema["type"]:
        case "array":
            return [samples_of(schema["items"])]
        case "object":
            values = samples_of(schema.get("additionalProperties", {"enum": []}))
            return [{f"key{index}": value for index, value in enumerate(values)}]
    return [{"boolean": True, "integer": 2, "null": None, "number": 0.5, "string": "text"}[schema["type"]]]


def kinds_of(schema: Any) -> set[str]:
    if "anyOf" in schema:
        return set().union(*(kinds_of(member) for member in schema["anyOf"]))
    return {"string"} if "enum" in schema else {schema["type"]}


def right_cases(table: str, key: str, row: ArgKey) -> list[Case]:
    values = [row.default, *SAMPLES.get(key, samples_of(row.type))]
    return [Case(table, key, value) for value in values]


CASES = [case for (table, key), row in FREE_KEYS.items() for case in right_cases(table, key, row)]


@pytest.fixture(scope="module")
def answer(trainer_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each real class says to its cases, and its table rendered anew: one process, as importing TRL is slow."""
    folder = tmp_path_factory.mktemp("training_args")
    cases, out = folder / "cases.json", folder / "out.json"
    by_table = {
        name: [coerce_args(case.args, table) for case in CASES if case.table == name] for name, table in TABLES.items()
    }
    cases.write_text(json.dumps(by_table))
    subprocess.run(
        [
            trainer_python,
            Path(__file__).with_name("build_training_args.py"),
            cases,
            out,
            ROOT / "scripts/generate_tables.py",
        ],
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        check=True,
        timeout=300,
    )
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", TABLES)
def test_the_committed_table_is_what_the_libraries_say(answer: dict[str, Any], name: str) -> None:
    committed = ROOT / "operator/posttrain/api/tables" / f"{name}.json"
    assert committed.read_text() == answer[name]["table"], "make generate"


@pytest.mark.parametrize("name", TABLES)
def test_the_real_class_takes_every_value_that_the_table_allows(answer: dict[str, Any], name: str) -> None:
    cases = [case for case in CASES if case.table == name]
    refused = {
        f"{case.key}={case.value!r}": error
        for case, error in zip(cases, answer[name]["errors"], strict=True)
        if error is not None
    }
    assert refused == {}


def test_the_checks_accept_every_right_value() -> None:
    problems = {
        f"{case.table}.{case.key}={case.value!r}": check_args(case.args, TABLES[case.table], path="args")
        for case in CASES
    }
    assert {case: found for case, found in problems.items() if found} == {}


@pytest.mark.parametrize(("table", "key"), FREE_KEYS)
def test_the_checks_refuse_a_value_of_each_other_type(table: str, key: str) -> None:
    row = FREE_KEYS[table, key]
    kinds = kinds_of(row.type)
    wrong = [value for kind, value in WRONG.items() if kind in kinds and not takes_json_type(kinds, value)]
    assert wrong
    for value in wrong:
        [problem] = check_args({key: value}, TABLES[table], path="args")
        assert problem.key == key


def takes_json_type(kinds: set[str], value: Any) -> bool:
    return {str: "string", list: "array", dict: "object"}[type(value)] in kinds
