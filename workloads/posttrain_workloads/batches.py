"""Batch arithmetic: rows, ranks and batch sizes to steps.

It owns the formulas of transformers' Trainer and accelerate's sharding; it must not import either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from posttrain_workloads.problems import Problem


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """What the number of steps depends on, as SFTConfig names it."""

    per_device: int
    accumulation: int
    world_size: int
    epochs: float
    max_steps: int
    drop_last: bool = False
    split_batches: bool = False
    """accelerate's: `per_device` is then what all ranks share."""
    per_device_eval: int | None = None
    """None: nothing is evaluated."""


@dataclass(frozen=True, kw_only=True)
class Batches:
    """What follows from them."""

    global_batch: int
    """Rows of one optimizer step, over all ranks."""
    steps_per_epoch: int
    total_steps: int
    epochs: float


def count_batches(settings: BatchSettings, *, rows: int) -> Batches:
    """Return the steps for so many rows (transformers 5.23, trainer.py:2487; accelerate 1.15, data_loader.py)."""
    batches = rows // settings.per_device if settings.drop_last else math.ceil(rows / settings.per_device)
    if not settings.split_batches:
        whole = batches // settings.world_size
        batches = whole if settings.drop_last or batches % settings.world_size == 0 else whole + 1
    steps = max(math.ceil(batches / settings.accumulation), 1)
    total = settings.max_steps if settings.max_steps > 0 else math.ceil(settings.epochs * steps)
    ranks = 1 if settings.split_batches else settings.world_size
    return Batches(
        global_batch=settings.per_device * settings.accumulation * ranks,
        steps_per_epoch=steps,
        total_steps=total,
        epochs=round(total / steps, 2),
    )


def find_batch_problems(settings: BatchSettings, *, rows: int) -> list[Problem]:
    """Return what makes the batches impossible."""
    problems = []
    if settings.split_batches:
        sizes = {"per_device_train_batch_size": settings.per_device}
        if settings.per_device_eval is not None:
            sizes["per_device_eval_batch_size"] = settings.per_device_eval
        for key, size in sizes.items():
            if size % settings.world_size:
                lower = size // settings.world_size * settings.world_size
                near = f"{lower} or {lower + settings.world_size}" if lower else str(settings.world_size)
                problems.append(
                    Problem(
                        "BatchNotDivisible",
                        f"spec.sft.args.{key} {size} is split over {settings.world_size} ranks "
                        f"(accelerator_config.split_batches) and is no multiple of them: write {near}, or leave "
                        "split_batches out",
                    )
                )
    needed = settings.per_device * (1 if settings.split_batches else settings.world_size)
    if settings.drop_last and rows < needed:
        problems.append(
            Problem(
                "BatchNotDivisible",
                f"dataloader_drop_last drops a batch that is not full, and {rows} rows fill none: one over "
                f"{settings.world_size} ranks takes {needed}; lower per_device_train_batch_size, leave "
                "dataloader_drop_last out, or add data",
            )
        )
    return problems


def warn_of_few_rows(settings: BatchSettings, *, rows: int, unit: str = "rows") -> str | None:
    """Return a remark where there are fewer rows (or packed sequences: `unit`) than one step takes, or None."""
    needed = settings.per_device * (1 if settings.split_batches else settings.world_size)
    if rows >= needed:
        return None
    return (
        f"{rows} {unit} do not fill one micro-batch over all ranks ({needed} {unit}): "
        + (f"the ranks share {unit} within a step" if settings.world_size > 1 else "batches are smaller than asked for")
        + "; lower per_device_train_batch_size"
    )
