"""What prepare found, and what becomes of it: a fact, a result, files in the storage, lines in the log.

It owns how findings are told; it must not look for any.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.api.reasons import advice_for
from posttrain.contract.config import TrainingConfig
from posttrain.contract.facts import PrepareResult
from posttrain.contract.result import Result
from posttrain_workloads.problems import Findings


@dataclass
class Outcome:
    """Everything that was found."""

    findings: Findings = field(default_factory=Findings)
    commits: dict[str, str] = field(default_factory=dict)
    """Hub commits by source: `model`, `datasets/0`, `evalDatasets/0`."""
    estimates: dict[str, str] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    effective_args: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    """URIs of what was resolved, by source: the starting model always, and every source on the Hub."""


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """What is known of the model, as far as it was to be had."""

    parameters: int | None = None
    tokenizer: Any | None = None
    shape: Mapping[str, Any] = field(default_factory=dict)
    """Its config.json, with the spec's overrides."""
    own_names: Mapping[str, str] = field(default_factory=dict)
    """What its config.json calls that for which transformers has a common name: num_attention_heads is n_head."""

    @property
    def text_shape(self) -> Mapping[str, Any]:
        """As much of its config.json as is about text."""
        text: Mapping[str, Any] = self.shape.get("text_config", self.shape)
        return text

    def number(self, name: str) -> int | None:
        """Return a number of its config.json by its common name, where it is there."""
        found = self.text_shape.get(name, self.text_shape.get(self.own_names.get(name, name)))
        return found if isinstance(found, int) else None


def checks_wanted(config: TrainingConfig) -> bool:
    """Tell whether more is wanted than the commits of moving revisions."""
    return config.spec.prepare.enabled or config.spec.prepare.dry_run


def build_fact(outcome: Outcome) -> PrepareResult:
    """Return the fact that tells of all findings."""
    return PrepareResult(
        problems=tuple(str(problem) for problem in outcome.findings.problems),
        warnings=tuple(outcome.findings.warnings),
        commits=outcome.commits,
        estimates=outcome.estimates,
    )


def build_result(config: TrainingConfig, outcome: Outcome) -> Result:
    """Return the result of a preparation without problems."""
    warnings = len(outcome.findings.warnings)
    remarks = f" with {warnings} warning{'s' * (warnings != 1)}" if warnings else ""
    checked = f"all checks passed{remarks}, and the inputs are fetched"
    return Result(
        reason="Prepared",
        message=checked if checks_wanted(config) else "revisions are resolved; nothing else was checked",
        advice=advice_for("Prepared"),
        metrics=outcome.estimates,
        artifacts=outcome.artifacts,
    )


def write_files(outcome: Outcome, *, storage: Path) -> None:
    """Leave samples.json and effective_args.json in the storage."""
    for name, content in (("samples.json", outcome.samples), ("effective_args.json", outcome.effective_args)):
        if content:
            (storage / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def say(outcome: Outcome) -> None:
    """Print the findings for whoever reads the log."""
    for name, value in outcome.estimates.items():
        print(f"{name}: {value}")
    for warning in outcome.findings.warnings:
        print(f"warning: {warning}")
    for problem in outcome.findings.problems:
        print(f"problem: {problem}", file=sys.stderr)
    sys.stdout.flush()
