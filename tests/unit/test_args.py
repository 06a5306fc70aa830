"""What the operator says about `args` without TRL: the language of the tables, and the messages."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

from posttrain.api.args import (
    ArgKey,
    ArgProblem,
    ArgsTable,
    check_args,
    check_deprecated,
    coerce_args,
    describe_type,
    load_table,
)


def build_key(schema: dict[str, Any], default: Any = None, **changes: Any) -> ArgKey:
    row = {"owned": None, "deprecated": False, "replacement": None, "help": ""} | changes
    return ArgKey(type=schema, default=default, **row)


def build_table(**keys: ArgKey) -> ArgsTable:
    return ArgsTable(
        class_name="trl.SFTConfig", library={"trl": "1.16.0"}, keys=keys, elsewhere={"lora_r": "write spec.peft.rank"}
    )


check = functools.partial(check_args, path="spec.sft.args")

NUMBER = {"type": "number"}
INTEGER = {"type": "integer"}
STRING = {"type": "string"}
BOOLEAN = {"type": "boolean"}
NULL = {"type": "null"}
STRATEGY = {"enum": ["no", "steps", "epoch"]}
NAMES = {"type": "array", "items": STRING}
SWITCHES = {"type": "object", "additionalProperties": BOOLEAN}

ACCEPTED: list[tuple[dict[str, Any], Any]] = [
    (NUMBER, 1),
    (NUMBER, 1e-5),
    (INTEGER, -1),
    (STRING, ""),
    (BOOLEAN, False),
    (STRATEGY, "steps"),
    (NAMES, []),
    (NAMES, ["a", "b"]),
    ({"type": "object"}, {"anything": [1, {"else": None}]}),
    (SWITCHES, {"rope": True}),
    ({"anyOf": [INTEGER, STRING, NULL]}, None),
    ({"anyOf": [INTEGER, STRING, NULL]}, "auto"),
    ({"anyOf": [{"type": "array", "items": {"enum": ["a"]}}, NULL]}, ["a"]),
    ({"enum": [False]}, False),
]

REFUSED: list[tuple[dict[str, Any], Any, str]] = [
    (NUMBER, "1e-5", 'must be a number, not the string "1e-5": write it without quotes (default: null)'),
    (NUMBER, "fast", 'must be a number, not the string "fast" (default: null)'),
    (NUMBER, True, "must be a number, not true (default: null)"),
    (NUMBER, float("nan"), "must be a number, not a number that is not finite (default: null)"),
    (NUMBER, None, "must be a number, not null: leave the key out for the default (default: null)"),
    (INTEGER, 1.5, "must be an integer, not the number 1.5 (default: null)"),
    (INTEGER, 2.0, "must be an integer, not the number 2.0 (default: null)"),
    (INTEGER, "8", 'must be an integer, not the string "8": write it without quotes (default: null)'),
    (INTEGER, False, "must be an integer, not false (default: null)"),
    (BOOLEAN, 1, "must be true or false, not 1 (default: null)"),
    (BOOLEAN, "true", 'must be true or false, not the string "true": write it without quotes (default: null)'),
    (STRING, 7, "must be a string, not 7: write it in quotes (default: null)"),
    (
        STRATEGY,
        "step",
        'must be one of "no", "steps", "epoch", not the string "step": did you mean "steps"? (default: null)',
    ),
    (
        STRATEGY,
        False,
        'must be one of "no", "steps", "epoch", not false: write "no" in quotes, because YAML reads a bare no as false '
        "(default: null)",
    ),
    (NAMES, "a", 'must be a list, each item a string, not the string "a" (default: null)'),
    (NAMES, ["a", 1], 'must be a list, each item a string, not ["a", 1] (default: null)'),
    (SWITCHES, {"rope": 1}, 'must be a mapping, each value true or false, not {"rope": 1} (default: null)'),
    ({"enum": [False]}, 0, "must be false, not 0 (default: null)"),
    (
        {"anyOf": [INTEGER, STRING, NULL]},
        1.5,
        "must be an integer or a string or null, not the number 1.5 (default: null)",
    ),
]


@pytest.mark.parametrize(("schema", "value"), ACCEPTED)
def test_a_value_of_the_type_is_accepted(schema: dict[str, Any], value: Any) -> None:
    assert check({"key": value}, build_table(key=build_key(schema))) == []


@pytest.mark.parametrize(("schema", "value", "message"), REFUSED)
def test_a_value_of_another_type_is_refused_with_what_to_change(
    schema: dict[str, Any], value: Any, message: str
) -> None:
    assert check({"key": value}, build_table(key=build_key(schema))) == [ArgProblem("key", message)]


def test_the_message_names_the_declared_default() -> None:
    table = build_table(rate=build_key(NUMBER, default=2e-05))
    assert check({"rate": []}, table) == [ArgProblem("rate", "must be a number, not [] (default: 2e-05)")]


def test_a_long_value_is_cut_in_the_message() -> None:
    problem = check({"key": list(range(1000))}, build_table(key=build_key(STRING)))[0]
    assert problem.message.startswith("must be a string, not [0, 1, 2")
    assert len(problem.message) < 120


def test_every_problem_is_found_at_once_and_in_order() -> None:
    table = build_table(
        learning_rate=build_key(NUMBER, default=2e-05),
        save_steps=build_key(NUMBER, default=500, owned="write spec.checkpoints.everySteps"),
    )
    args = {"learnig_rate": 1e-5, "save_steps": 10, "learning_rate": "1e-5", "lora_r": 8, "zzz": 1}
    assert check(args, table) == [
        ArgProblem("learnig_rate", "is no key of trl.SFTConfig: did you mean learning_rate?"),
        ArgProblem("save_steps", "is set by posttrain: write spec.checkpoints.everySteps"),
        ArgProblem(
            "learning_rate", 'must be a number, not the string "1e-5": write it without quotes (default: 2e-05)'
        ),
        ArgProblem("lora_r", "is no key of trl.SFTConfig: write spec.peft.rank"),
        ArgProblem("zzz", "is no key of trl.SFTConfig (TRL 1.16.0): see `posttrain explain spec.sft.args`"),
    ]


def test_a_deprecated_key_is_accepted_with_a_remark() -> None:
    table = build_table(
        old=build_key(BOOLEAN, deprecated=True, replacement="new"), older=build_key(BOOLEAN, deprecated=True)
    )
    args = {"old": True, "older": True}
    assert check(args, table) == []
    assert check_deprecated(args, table) == [
        ArgProblem("old", "is deprecated in trl.SFTConfig: write new"),
        ArgProblem("older", "is deprecated in trl.SFTConfig and will go in a later release"),
    ]


def test_an_integer_becomes_a_float_only_where_no_integer_is_allowed() -> None:
    table = build_table(
        rate=build_key(NUMBER),
        optional=build_key({"anyOf": [NUMBER, NULL]}),
        steps=build_key(INTEGER),
        either=build_key({"anyOf": [INTEGER, NUMBER]}),
        flag=build_key(BOOLEAN),
        free=build_key({"type": "object"}),
    )
    args = {"rate": 1, "optional": 2, "steps": 3, "either": 4, "flag": True, "free": {"rate": 1}}
    coerced = coerce_args(args, table)
    assert json.dumps(coerced) == json.dumps(args | {"rate": 1.0, "optional": 2.0})
    assert coerce_args({"optional": None}, table) == {"optional": None}


def test_types_are_described_in_plain_words() -> None:
    assert describe_type({"anyOf": [INTEGER, STRING, NULL]}) == "an integer or a string or null"
    assert describe_type(STRATEGY) == 'one of "no", "steps", "epoch"'
    assert describe_type({"anyOf": [SWITCHES, NULL]}) == "a mapping, each value true or false or null"


def test_the_sft_table_knows_what_recipes_write() -> None:
    table = load_table("sft_config")
    args = {
        "learning_rate": 4e-5,
        "num_train_epochs": 1,
        "packing": True,
        "max_length": 16384,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": 0.1,
        "eval_strategy": "no",
        "pad_to_multiple_of": 8,
        "seed": 42,
    }
    assert check(args, table) == []
    assert coerce_args(args, table)["num_train_epochs"] == 1.0


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("max_seq_length", "max_length"),
        ("warmup_ratio", "warmup_steps"),
        ("torch_dtype", "spec.model.dtype"),
        ("output_dir", "spec.checkpoints.storage"),
        ("save_total_limit", "spec.checkpoints.keepLast"),
        ("deepspeed", "spec.parallelism"),
        ("report_to", "spec.tracking.reportTo"),
        ("model_init_kwargs", "spec.model"),
        ("eos_token", "spec.model.eosToken"),
        ("learning_rat", "learning_rate"),
        ("packin", "packing"),
    ],
)
def test_a_key_that_does_not_belong_into_sft_args_is_answered_with_the_place_that_does(key: str, part: str) -> None:
    [problem] = check({key: 1}, load_table("sft_config"))
    assert problem.key == key
    assert part in problem.message


def test_every_row_of_the_sft_table_is_in_the_language_of_the_checks() -> None:
    table = load_table("sft_config")
    assert [key for key, row in table.keys.items() if not describe_type(row.type)] == []
    declared = {key: row.default for key, row in table.keys.items() if row.owned is None}
    assert check(declared, table) == []
