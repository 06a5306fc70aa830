"""Runs of this machine that another run starts from.

It owns how a run is found by its name, and which folder stands for the claim with its model; it must not read what a
run wrote.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.api.training_run import TrainingRunSpec
from posttrain.errors import Problem
from posttrain.local.state import RunFolder, list_runs
from posttrain.plan.references import parse_run_state
from posttrain.plan.sources import split_claim
from posttrain.plan.types import Manifest

_PATH = "spec.model.runRef.name"


@dataclass(frozen=True, kw_only=True)
class Referenced:
    """What a run refers to, as a plan and its pods need it."""

    runs: Mapping[str, Manifest] = field(default_factory=dict)
    claims: Mapping[str, Path] = field(default_factory=dict)
    """Folders by claim."""


def find_reference_problems(spec: TrainingRunSpec, *, state_root: Path, beside: Collection[str]) -> Iterator[Problem]:
    """Yield what is wrong with the run that a spec refers to; `beside` are the runs that are executed before."""
    reference = spec.model.run_ref
    if reference is None or reference.name in beside:
        return
    run = RunFolder(state_root / reference.name).read_run()
    if run is None:
        known = ", ".join(folder.name for folder in list_runs(state_root)) or "none"
        message = (
            f"there is no run {reference.name} in this file, nor in {state_root} (there are: {known}): "
            "write it into the same file, or run it first"
        )
        yield Problem(path=_PATH, message=message)
        return
    state = parse_run_state(run.to_data())
    if state.failure is not None:
        yield Problem(path=_PATH, message=state.failure)
    elif not state.finished:
        yield Problem(
            path=_PATH, message=f"run {reference.name} has not ended ({state.stage}): run it to its end first"
        )


def observe_referenced(spec: TrainingRunSpec, *, state_root: Path) -> Referenced:
    """Return what a spec refers to, as it is now."""
    reference = spec.model.run_ref
    if reference is None:
        return Referenced()
    folder = RunFolder(state_root / reference.name)
    run = folder.read_run()
    if run is None:
        return Referenced()
    manifest = run.to_data()
    uri = parse_run_state(manifest).model_uri
    # The link leads to the run's own folder on the claim.
    claims = {split_claim(uri)[0]: folder.storage.resolve().parent} if uri is not None else {}
    return Referenced(runs={reference.name: manifest}, claims=claims)
