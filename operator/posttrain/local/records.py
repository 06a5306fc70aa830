"""What a run wrote into its storage, read for reports: history, facts, samples, effective arguments.

It owns where those files lie and how a torn one is passed over; status is never made from any of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from posttrain.contract.checkpoints import CHECKPOINT_PREFIX, MARKER_NAME
from posttrain.contract.facts import FACT, CheckpointSaved, Fact, PrepareResult
from posttrain.local.curves import merge_history


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of a rendered row, and whether its tokens are trained on."""

    text: str
    trained: bool


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row as the trainer sees it."""

    segments: tuple[Segment, ...]
    tokens: int
    trained_tokens: int
    tokens_cut: int
    """Tokens past max_length, which the trainer drops."""


@dataclass(frozen=True, kw_only=True)
class Records:
    """Everything a report is made from, besides the resource; what is not there is empty."""

    history: Mapping[int, Mapping[str, float]]
    """Every logged number, by step and name."""
    facts: tuple[Fact, ...]
    """In the order in which they happened."""
    samples: tuple[Sample, ...]
    effective_args: Mapping[str, Any]
    notes: tuple[str, ...]
    """What could not be read."""

    @property
    def checkpoints(self) -> tuple[CheckpointSaved, ...]:
        """Every checkpoint that was completed, a step's last one only."""
        saved = {fact.body.step: fact.body for fact in self.facts if isinstance(fact.body, CheckpointSaved)}
        return tuple(saved[step] for step in sorted(saved))

    @property
    def prepared(self) -> PrepareResult | None:
        """The latest findings of prepare."""
        found = [fact.body for fact in self.facts if isinstance(fact.body, PrepareResult)]
        return found[-1] if found else None


def read_records(storage: Path) -> Records:
    """Return what lies in a run's storage, however little that is."""
    notes: list[str] = []
    facts = _read_facts(storage, notes=notes)
    state = _read_json(_newest_trainer_state(storage), notes=notes) or {}
    return Records(
        history=merge_history(state.get("log_history", ()), facts=facts),
        facts=facts,
        samples=_parse_samples(_read_json(storage / "samples.json", notes=notes)),
        effective_args=_read_json(storage / "effective_args.json", notes=notes) or {},
        notes=tuple(notes),
    )


def _read_facts(storage: Path, *, notes: list[str]) -> tuple[Fact, ...]:
    facts = []
    for file in sorted(storage.glob("facts*.jsonl")):
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
            try:
                facts.append(FACT.validate_json(line))
            except ValidationError:
                # A process that is killed while it writes leaves half a line.
                notes.append(f"{file.name}:{number} is not a fact and was passed over")
    return tuple(sorted(facts, key=lambda fact: (fact.time, fact.attempt, fact.source, fact.seq)))


def _newest_trainer_state(storage: Path) -> Path:
    """Return the state at the end of training, else that of the newest complete checkpoint."""
    complete = [
        folder
        for folder in storage.glob(f"{CHECKPOINT_PREFIX}*")
        if folder.name.removeprefix(CHECKPOINT_PREFIX).isdecimal() and (folder / MARKER_NAME).exists()
    ]
    at_end = storage / "trainer_state.json"
    if at_end.exists() or not complete:
        return at_end
    newest = max(complete, key=lambda folder: int(folder.name.removeprefix(CHECKPOINT_PREFIX)))
    return newest / "trainer_state.json"


def _read_json(file: Path, *, notes: list[str]) -> Any:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        notes.append(f"{file.name} is not JSON ({error}) and was passed over")
        return None


def _parse_samples(data: Any) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            segments=tuple(Segment(text=part["text"], trained=part["trained"]) for part in row["segments"]),
            tokens=row["tokens"],
            trained_tokens=row["trained_tokens"],
            tokens_cut=row["tokens_cut"],
        )
        for row in data or ()
    )
