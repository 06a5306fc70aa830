"""The completions that a grpo run keeps of its logged steps, for `posttrain samples`.

It owns how they are found and shown; the Parquet files are read by the run's own environment, which has a reader.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.api.training_run import TrainingRun
from posttrain.contract.completions import COMPLETIONS_FOLDER, completions_file, step_of_file
from posttrain.errors import UserError
from posttrain.local.environments import ensure_environment
from posttrain.local.state import RunFolder

_REWARD = "reward/"


def read_completions(
    run: TrainingRun, *, folder: RunFolder, step: int | None, cache: Path
) -> tuple[int, list[Mapping[str, Any]]]:
    """Return a step and what was kept of it; without `step` the newest one.

    Raises:
        UserError: nothing is kept of it.
    """
    kept = folder.storage / COMPLETIONS_FOLDER
    names = [file.name for file in kept.iterdir()] if kept.is_dir() else []
    steps = sorted(found for name in names if (found := step_of_file(name)) is not None)
    if not steps:
        why = "it has logged no step yet" if run.spec.grpo else "only runs with grpo generate any"
        raise UserError(f"{run.metadata.name} has no completions: {why}")
    wanted = steps[-1] if step is None else step
    if wanted not in steps:
        raise UserError(
            f"{run.metadata.name} has no completions of step {wanted}; there are {len(steps)} steps, from {steps[0]} "
            f"to {steps[-1]} (spec.grpo.args.logging_steps says which)"
        )
    interpreter = ensure_environment(run.spec.image_name, cache=cache, report=lambda line: print(line, file=sys.stderr))
    done = subprocess.run(
        [interpreter, "-m", "posttrain_workloads.completions", folder.storage / completions_file(wanted)],
        env={**os.environ, "PYTHONPATH": str(folder.packages)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rows: list[Mapping[str, Any]] = json.loads(done.stdout)
    return wanted, rows


def render_completions(rows: Sequence[Mapping[str, Any]], *, step: int) -> str:
    """Return completions as text, under each prompt what it was answered with, best advantage first."""
    lines = [f"Step {step}: {len(rows)} completions"]
    prompts = dict.fromkeys(row["prompt"] for row in rows)
    for prompt in prompts:
        lines += ["", *(f"> {line}" for line in prompt.splitlines())]
        group = [row for row in rows if row["prompt"] == prompt]
        for row in sorted(group, key=lambda row: -row["advantage"]):
            rewards = ", ".join(
                f"{name.removeprefix(_REWARD)} {'none' if value is None else format(value, '.3g')}"
                for name, value in row.items()
                if name.startswith(_REWARD)
            )
            weights = f"; weights {row['weights']}" if "weights" in row else ""
            lines += ["", f"  [{rewards}; advantage {row['advantage']:+.3g}{weights}]"]
            lines += [f"  {line}" for line in row["completion"].splitlines()]
    return "\n".join(lines)
