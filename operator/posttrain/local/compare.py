"""Two runs side by side: what differs in their configuration, and their curves laid over each other.

It owns what counts as a difference and the comparison's page; it must not read anything but the two runs' records.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain import __version__
from posttrain.api.training_run import TrainingRun
from posttrain.local.curves import Line, build_chart
from posttrain.local.pages import write_page
from posttrain.local.records import Records, read_records
from posttrain.local.report import FROM_ZERO, headline_figures, metric_lines, provenance_rows, title_of

ABSENT = "-"
"""Stands for a value that one of the two does not have."""

_OWN_TO_EACH = frozenset({"output_dir", "run_name"})
"""Arguments that name the run."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two runs, with what it left in its storage."""

    run: TrainingRun
    records: Records

    @property
    def name(self) -> str:
        """The run's name."""
        return self.run.metadata.name


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One value that is not the same in both."""

    section: str
    """Outcome, Spec, Effective arguments or Provenance."""
    name: str
    first: str
    second: str


def read_side(run: TrainingRun, *, storage: Path) -> Side:
    """Return a run and what lies in its storage."""
    return Side(run=run, records=read_records(storage))


def outcomes(first: Side, *, second: Side) -> list[Difference]:
    """Return how both ended, number by number, equal ones too."""
    results = [
        {figure.label: figure.value for figure in headline_figures(s.run, records=s.records)} for s in (first, second)
    ]
    stages = [{"Stage": side.run.status.stage or "Pending"} for side in (first, second)]
    return _pair(stages[0] | results[0], stages[1] | results[1], section="Outcome", equal_too=True)


def differences(first: Side, *, second: Side) -> list[Difference]:
    """Return every difference of configuration, by section and name.

    An effective argument that differs only because it was set so in the spec's `args` is shown once, under the spec.
    """
    specs = [dict(flatten(side.run.spec.to_data(), path="spec")) for side in (first, second)]
    found = _pair(specs[0], specs[1], section="Spec")
    in_spec = {difference.name.rpartition(".args.")[2] for difference in found}
    args = [
        {
            name: _text(value)
            for name, value in side.records.effective_args.items()
            if name not in in_spec and name not in _OWN_TO_EACH
        }
        for side in (first, second)
    ]
    if all(args):  # a run that never came so far has none, which is no difference
        found += _pair(args[0], args[1], section="Effective arguments")
    found += _pair(dict(provenance_rows(first.run)), dict(provenance_rows(second.run)), section="Provenance")
    return found


def flatten(data: Any, *, path: str) -> Iterator[tuple[str, str]]:
    """Yield the leaves of JSON data with their paths: `spec.datasets[0].source`."""
    if isinstance(data, dict) and data:
        for key, value in data.items():
            yield from flatten(value, path=f"{path}.{key}")
    elif isinstance(data, list) and any(isinstance(item, dict | list) for item in data):
        for index, item in enumerate(data):
            yield from flatten(item, path=f"{path}[{index}]")
    else:
        yield path, _text(data)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _pair(
    first: Mapping[str, str], second: Mapping[str, str], *, section: str, equal_too: bool = False
) -> list[Difference]:
    return [
        Difference(section=section, name=name, first=first.get(name, ABSENT), second=second.get(name, ABSENT))
        for name in dict.fromkeys([*first, *second])
        if equal_too or first.get(name) != second.get(name)
    ]


def write_comparison(first: Side, *, second: Side, out: Path) -> None:
    """Write the page that compares the two runs to the file `out`."""
    lines = [metric_lines(side.records) for side in (first, second)]
    charts = [
        build_chart(
            [*_recoloured(lines[0].get(name, []), name=first.name, colour=1),
             *_recoloured(lines[1].get(name, []), name=second.name, colour=2)],
            title=title_of(name),
            from_zero=name in FROM_ZERO,
            width=1000 if name == "loss" else 490,
            height=300 if name == "loss" else 210,
        )
        for name in dict.fromkeys([*lines[0], *lines[1]])
    ]  # fmt: skip
    found = differences(first, second=second)
    write_page(
        out,
        template="compare.html",
        first=first,
        second=second,
        outcomes=outcomes(first, second=second),
        sections={
            section: [d for d in found if d.section == section] for section in dict.fromkeys(d.section for d in found)
        },
        charts=[chart for chart in charts if chart is not None],
        notes=[*first.records.notes, *second.records.notes],
        version=__version__,
    )


def _recoloured(lines: list[Line], *, name: str, colour: int) -> Iterator[Line]:
    for line in lines:
        held_out = line.name == "held out"
        yield Line(
            name=f"{name}, held out" if held_out else name,
            points=line.points,
            colour=colour,
            dashed=held_out,
            noisy=line.noisy,
        )
