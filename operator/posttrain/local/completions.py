"""The completions that a grpo run keeps of its logged steps, for `posttrain samples`.

It owns how they are found and shown; the Parquet files are read by the run's own environment, which has a reader.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from posttrain.api.training_run import TrainingRun
from posttrain.contract.completions import COMPLETIONS_FOLDER, completions_file, step_of_file
from posttrain.errors import UserError
from posttrain.local.environments import ensure_environment
from posttrain.local.packages import link_packages
from posttrain.local.state import RunFolder

_REWARD = "reward/"
Row = Mapping[str, Any]
"""A completion as it is kept: prompt, completion, advantage, and each reward under `reward/<its name>`."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One completion with what it scored, in words."""

    scored: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """A prompt and its completions, the best first."""

    prompt: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, kw_only=True)
class Newest:
    """What a report shows of the newest step of which completions are kept."""

    step: int
    groups: tuple[Group, ...] = ()
    note: str = ""
    """Why they could not be read."""


def newest_completions(run: TrainingRun, *, folder: RunFolder, cache: Path) -> Newest | None:
    """Return the completions of the newest step, or None where none are kept."""
    steps = kept_steps(folder.storage)
    if not steps:
        return None
    try:
        step, rows = read_completions(run, folder=folder, step=steps[-1], cache=cache)
    except UserError as error:  # a report without them is still one
        return Newest(step=steps[-1], note=str(error))
    return Newest(step=step, groups=tuple(group_completions(rows)))


def read_completions(run: TrainingRun, *, folder: RunFolder, step: int | None, cache: Path) -> tuple[int, list[Row]]:
    """Return a step and what was kept of it; without `step` the newest one.

    Raises:
        UserError: nothing is kept of it, or it cannot be read.
    """
    name = run.metadata.name
    why = "it has logged no step yet" if run.spec.grpo else "only runs with grpo generate any"
    wanted = _choose_step(name, storage=folder.storage, step=step, why=why)
    interpreter = ensure_environment(run.spec.image_name, cache=cache, report=lambda line: print(line, file=sys.stderr))
    return wanted, _read(name, folder.storage / completions_file(wanted), interpreter, packages=folder.packages)


def read_completions_on_claim(name: str, *, claim: Path, step: int | None, cache: Path) -> tuple[int, list[Row]]:
    """Return the same of a run in a cluster: `claim` is where its claim is mounted, or lies as a copy.

    Raises:
        UserError: nothing is kept of it, or it cannot be read.
    """
    storage = claim / name  # as every pod mounts it
    why = f"there is no {storage / COMPLETIONS_FOLDER}. --claim takes the folder where the run's claim is mounted"
    wanted = _choose_step(name, storage=storage, step=step, why=why)
    interpreter = ensure_environment("trainer", cache=cache, report=lambda line: print(line, file=sys.stderr))
    with TemporaryDirectory(prefix="posttrain-") as packages:
        link_packages(Path(packages))
        return wanted, _read(name, storage / completions_file(wanted), interpreter, packages=Path(packages))


def _choose_step(name: str, *, storage: Path, step: int | None, why: str) -> int:
    steps = kept_steps(storage)
    if not steps:
        raise UserError(f"{name} has no completions: {why}")
    wanted = steps[-1] if step is None else step
    if wanted not in steps:
        raise UserError(
            f"{name} has no completions of step {wanted}; there are {len(steps)} steps, from {steps[0]} to {steps[-1]} "
            "(spec.grpo.args.logging_steps says which)"
        )
    return wanted


def _read(name: str, file: Path, interpreter: Path, *, packages: Path) -> list[Row]:
    done = subprocess.run(
        [interpreter, "-m", "posttrain_workloads.completions", file],
        env={**os.environ, "PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(f"{file.name} of {name} cannot be read:\n{done.stderr.strip()}")
    rows: list[Row] = json.loads(done.stdout)
    return rows


def kept_steps(storage: Path) -> list[int]:
    """Return the steps of which completions are kept."""
    kept = storage / COMPLETIONS_FOLDER
    names = [file.name for file in kept.iterdir()] if kept.is_dir() else []
    return sorted(found for name in names if (found := step_of_file(name)) is not None)


def group_completions(rows: Sequence[Row]) -> list[Group]:
    """Return completions under their prompts, in the order of these, of each the best advantage first."""
    return [
        Group(
            prompt=prompt,
            answers=tuple(
                Answer(scored=_scores_text(row), text=row["completion"])
                for row in sorted(rows, key=lambda row: -row["advantage"])
                if row["prompt"] == prompt
            ),
        )
        for prompt in dict.fromkeys(row["prompt"] for row in rows)
    ]


def _scores_text(row: Row) -> str:
    rewards = ", ".join(
        f"{name.removeprefix(_REWARD)} {'none' if value is None else format(value, '.3g')}"
        for name, value in row.items()
        if name.startswith(_REWARD)
    )
    weights = f"; weights {row['weights']}" if "weights" in row else ""
    return f"{rewards}; advantage {row['advantage']:+.3g}{weights}"


def render_completions(rows: Sequence[Row], *, step: int) -> str:
    """Return completions as text, under each prompt what it was answered with."""
    lines = [f"Step {step}: {len(rows)} completions"]
    for group in group_completions(rows):
        lines += ["", *(f"> {line}" for line in group.prompt.splitlines())]
        for answer in group.answers:
            lines += ["", f"  [{answer.scored}]", *(f"  {line}" for line in answer.text.splitlines())]
    return "\n".join(lines)
