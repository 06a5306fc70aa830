"""Batch arithmetic, as transformers and accelerate do it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from posttrain_workloads.batches import (
    Batches,
    BatchSettings,
    count_batches,
    find_batch_problems,
    warn_of_few_rows,
)

ONE = BatchSettings(per_device=4, accumulation=1, world_size=1, epochs=2, max_steps=-1)


@pytest.mark.parametrize(
    ("changes", "rows", "expected"),
    [
        ({}, 10, Batches(global_batch=4, steps_per_epoch=3, total_steps=6, epochs=2)),
        ({"drop_last": True}, 10, Batches(global_batch=4, steps_per_epoch=2, total_steps=4, epochs=2)),
        ({"accumulation": 2}, 10, Batches(global_batch=8, steps_per_epoch=2, total_steps=4, epochs=2)),
        ({"epochs": 1.5}, 10, Batches(global_batch=4, steps_per_epoch=3, total_steps=5, epochs=1.67)),
        ({"max_steps": 7}, 10, Batches(global_batch=4, steps_per_epoch=3, total_steps=7, epochs=2.33)),
        # three batches over two ranks: two rounds, the last one filled up
        ({"world_size": 2}, 10, Batches(global_batch=8, steps_per_epoch=2, total_steps=4, epochs=2)),
        ({"world_size": 2, "drop_last": True}, 12, Batches(global_batch=8, steps_per_epoch=1, total_steps=2, epochs=2)),
        (
            {"world_size": 2, "split_batches": True},
            10,
            Batches(global_batch=4, steps_per_epoch=3, total_steps=6, epochs=2),
        ),
        # the recipe of OpenR1-Distill-7B: 349,317 rows, 128 a step, 5 epochs
        (
            {"per_device": 2, "accumulation": 8, "world_size": 8, "epochs": 5},
            349_317,
            Batches(global_batch=128, steps_per_epoch=2730, total_steps=13650, epochs=5),
        ),
    ],
)
def test_steps_follow_from_rows_and_ranks(changes: dict[str, Any], rows: int, expected: Batches) -> None:
    assert count_batches(replace(ONE, **changes), rows=rows) == expected


def test_a_split_batch_must_be_a_multiple_of_the_ranks() -> None:
    settings = replace(ONE, per_device=6, world_size=4, split_batches=True, per_device_eval=3)
    train, evaluation = find_batch_problems(settings, rows=100)
    assert train.reason == evaluation.reason == "BatchNotDivisible"
    assert "per_device_train_batch_size 6" in train.message and "write 4 or 8" in train.message
    assert "per_device_eval_batch_size 3" in evaluation.message and "write 4" in evaluation.message
    assert find_batch_problems(replace(settings, split_batches=False), rows=100) == []


def test_dropping_the_only_batch_is_refused() -> None:
    [problem] = find_batch_problems(replace(ONE, world_size=4, drop_last=True), rows=15)
    assert "15 rows fill none" in problem.message and "takes 16" in problem.message
    assert find_batch_problems(replace(ONE, world_size=4, drop_last=True), rows=16) == []


def test_fewer_rows_than_a_step_takes_are_remarked_on() -> None:
    assert warn_of_few_rows(replace(ONE, world_size=2), rows=8) is None
    remark = warn_of_few_rows(replace(ONE, world_size=2), rows=7)
    assert remark is not None and "7 rows" in remark and "8 rows" in remark
