"""What reporting and verified checkpoints cost a step of SFT, against plain TRL with the same settings.

    .venv/bin/python benchmarks/sft_overhead.py [--pairs 12] [--every 8] [--batch 4]

Runs of the quickstart's real model on one CPU thread each, which train two steps in turn: plain TRL, posttrain's rank
with a progress server, and the same with a server that takes connections and never answers. A block of steps has one
checkpoint of 1.6 GB, which is many times denser than in a run that matters; the ratio is the median over the pairs of
blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from overhead import INPUTS, PLAIN, REPORTING, UNREACHABLE, median_ratio, parse_options, quartiles, run_in_turn


def main() -> None:
    """Measure, and print one line."""
    options = parse_options(__doc__, pairs=12, every=8, batch=4)
    timed = run_in_turn("sft_overhead", (PLAIN, REPORTING, UNREACHABLE), options)
    print(
        f"SFT step with reporting and verified checkpoints against plain TRL: {median_ratio(timed, REPORTING):.3f}x "
        f"({quartiles(timed, REPORTING)}), with an unreachable progress server {median_ratio(timed, UNREACHABLE):.3f}x "
        f"({quartiles(timed, UNREACHABLE)}); median and quartiles of {options.pairs} pairs of {options.every} steps of "
        f"{timed[PLAIN].step:.2f} s and a checkpoint"
    )


# What follows runs in the trainer's environment.


def build_config(*, steps: int, batch: int, **spec: Any) -> Any:
    """Return the config of a run of so many steps."""
    from tests.workloads._configs import build_config as build

    args = {"max_steps": steps, "per_device_train_batch_size": batch, "learning_rate": 1e-5}
    return build(model=INPUTS / "model", rows=INPUTS / "train.jsonl", args=args, **spec)


def train_plainly(config: Any, *, environ: Mapping[str, str]) -> None:
    """Train with TRL's own trainer, its own checkpoints and their own rotation."""
    from trl import SFTConfig, SFTTrainer

    from posttrain_workloads.arguments import training_args
    from posttrain_workloads.data import load_mixture
    from posttrain_workloads.formats import shape_for_sft
    from posttrain_workloads.model import load_model, load_tokenizer
    from posttrain_workloads.owncode import build_callbacks

    args = SFTConfig(**{**training_args(config, environ=environ), "save_total_limit": 2})
    trainer = SFTTrainer(
        model=load_model(config, environ=environ),
        args=args,
        train_dataset=load_mixture(config, shape=partial(shape_for_sft, config), environ=environ).train,
        processing_class=load_tokenizer(config, environ=environ),
        callbacks=build_callbacks(config),
    )
    trainer.train()


def train(rank: Any) -> None:
    """Train as a rank of a run."""
    from posttrain_workloads.sft import train as train_sft

    train_sft(rank)


if __name__ == "__main__":
    main()
