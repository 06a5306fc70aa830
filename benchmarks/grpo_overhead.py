"""What posttrain costs a step of GRPO, against plain TRL with the same settings, and what the step is spent on.

    .venv/bin/python benchmarks/grpo_overhead.py [--pairs 7] [--every 4] [--batch 8]

Runs of the quickstart's real model on its sums, on one CPU thread each, which train two steps in turn: plain TRL with
the quickstart's own reward, and posttrain's rank with the same reward, its watch over errors, kept completions, the
checks of the signal, a progress server and verified checkpoints, one in each block of steps. Losses and rewards of
every step are compared before any time is printed; the ratio is the median over the pairs of blocks. The split is what
posttrain logs itself, as time/*.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any

from overhead import INPUTS, PLAIN, REPORTING, ROOT, median_ratio, parse_options, quartiles, run_in_turn

OWN_CODE = ROOT / "examples" / "quickstart" / "own"
PARTS = ("rollout", "rewards", "training")


def main() -> None:
    """Measure, and print one line."""
    options = parse_options(__doc__, pairs=7, every=4, batch=8)
    timed = run_in_turn("grpo_overhead", (PLAIN, REPORTING), options, python_path=[OWN_CODE])
    plain, ours = ([(log["loss"], log["reward"]) for log in timed[side].logs] for side in (PLAIN, REPORTING))
    if plain != ours or len(plain) <= options.pairs * options.every:
        raise SystemExit(f"losses and rewards differ, so the times mean nothing: {plain}, {ours}")
    steps = timed[REPORTING].logs[1:]
    whole = statistics.mean(log["time/step"] for log in steps)
    split = ", ".join(f"{part} {statistics.mean(log[f'time/{part}'] for log in steps) / whole:.1%}" for part in PARTS)
    print(
        f"GRPO step of posttrain against plain TRL: {median_ratio(timed, REPORTING):.3f}x "
        f"({quartiles(timed, REPORTING)}; median and quartiles of {options.pairs} pairs of {options.every} steps of "
        f"{timed[PLAIN].step:.2f} s and a checkpoint; {split}); losses and rewards are equal"
    )


# What follows runs in the trainer's environment.


def build_config(*, steps: int, batch: int, **spec: Any) -> Any:
    """Return the config of a run of so many steps."""
    from tests.workloads._configs import build_grpo_config

    args = {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "num_generations": batch,
        "max_completion_length": 24,
        "learning_rate": 1e-5,
        "bf16": False,
    }
    return build_grpo_config(
        model=INPUTS / "model",
        model_fields={"dtype": "float32"},
        rows=INPUTS / "problems.jsonl",
        rewards=[{"function": "answers:last_number"}],
        args=args,
        **spec,
    )


def train_plainly(config: Any, *, environ: Mapping[str, str]) -> None:
    """Train with TRL's own trainer and the reward as it is."""
    from answers import last_number
    from transformers import set_seed
    from trl import GRPOConfig, GRPOTrainer

    from posttrain_workloads.arguments import training_args
    from posttrain_workloads.data import load_mixture
    from posttrain_workloads.model import load_model, load_tokenizer
    from posttrain_workloads.owncode import build_callbacks
    from posttrain_workloads.prompts import shape_prompts

    args = GRPOConfig(**{**training_args(config, environ=environ), "save_total_limit": 2})
    set_seed(args.seed)
    shape = partial(shape_prompts, config, templated=True)
    trainer = GRPOTrainer(
        model=load_model(config, environ=environ),
        reward_funcs=[last_number],
        args=args,
        train_dataset=load_mixture(config, shape=shape, environ=environ).train,
        processing_class=load_tokenizer(config, environ=environ),
        callbacks=build_callbacks(config),
    )
    trainer.train()


def train(rank: Any) -> None:
    """Train as a rank of a run."""
    from posttrain_workloads.grpo import train as train_grpo

    train_grpo(rank)


if __name__ == "__main__":
    main()
