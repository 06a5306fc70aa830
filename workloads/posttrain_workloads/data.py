"""From spec.datasets to the rows that the trainer gets: load, choose, rename, mix, and normalise to one format.

It owns the mixture and its formats; it must not tokenize, nor know anything of a model.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.api.inputs import Dataset as Member
from posttrain.contract.config import ResolvedSource, TrainingConfig
from posttrain_workloads import hub
from posttrain_workloads._compat import hub_transport_error
from posttrain_workloads.formats import Layout
from posttrain_workloads.problems import Findings, InvalidInputs, Problem, refuse
from posttrain_workloads.sources import describe, locate

if TYPE_CHECKING:
    from datasets import Dataset

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_KINDS = "JSON, JSONL, Parquet or CSV"


Shape = Callable[["Dataset", str], tuple[Layout, "Dataset"]]
"""Tells a member's layout and gives its rows as the trainer takes them; the text is where it stands in the spec."""


@dataclass(frozen=True, kw_only=True)
class MemberReport:
    """What became of one member; `path` is where it stands in the spec."""

    path: str
    source: str
    rows: int
    """Rows it has."""
    used: int
    """Rows that the mixture takes of it."""
    columns: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a mixture came about."""

    layout: Layout
    members: tuple[MemberReport, ...]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Rows to train on, and rows held out."""

    train: Dataset
    test: Dataset | None
    report: Report


def load_mixture(config: TrainingConfig, *, shape: Shape, environ: Mapping[str, str]) -> Mixture:
    """Return the run's data, the same rows in the same order in every process and every attempt.

    As in open-r1: of each member `int(len * fraction)` rows after a shuffle with the seed; the members one after the
    other; one shuffle with the seed; then the split. The work is cached below HF_HOME: let one process go first.

    Raises:
        InvalidInputs: every problem of every member.
    """
    spec = config.spec
    findings = Findings()
    load = functools.partial(_load_members, config, shape=shape, findings=findings, environ=environ)
    train = load("datasets", spec.datasets, config.datasets)
    held_out = load("evalDatasets", spec.eval_datasets, config.eval_datasets)
    for loaded, field in ((train, "datasets"), (held_out, "evalDatasets")):
        for problem in _differing_columns(loaded, field=field):
            findings.add(problem)
    layouts = [member.layout for member in (*train, *held_out)]
    for member in (*train, *held_out):
        if member.layout.format != layouts[0].format:
            findings.add(
                Problem(
                    "DatasetColumnsDiffer",
                    f"{member.report.path} holds {member.layout} and {train[0].report.path if train else ''} holds "
                    f"{layouts[0]}: a run takes one format; select or rename columns until they agree",
                )
            )
    if findings.problems:
        raise InvalidInputs(findings.problems)
    rows = _mix(train, seed=spec.dataset_seed, field="datasets")
    test = _mix(held_out, seed=spec.dataset_seed, field="evalDatasets") if held_out else None
    if spec.test_fraction is not None:
        rows, test = _split(rows, spec.test_fraction, seed=spec.dataset_seed)
    members = tuple(member.report for member in (*train, *held_out))
    return Mixture(train=rows, test=test, report=Report(layout=layouts[0], members=members))


# --- One member ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    rows: Dataset
    layout: Layout
    report: MemberReport


def _load_members(
    config: TrainingConfig,
    field: str,
    members: Sequence[Member],
    sources: Sequence[ResolvedSource],
    *,
    shape: Shape,
    findings: Findings,
    environ: Mapping[str, str],
) -> list[_Loaded]:
    loaded = []
    for index, (member, source) in enumerate(zip(members, sources, strict=True)):
        with findings.collect():
            path = f"spec.{field}[{index}]"
            whole = _load(member, source, path=path, environ=environ)
            chosen = _choose(whole, member, path=path, seed=config.spec.dataset_seed)
            report = MemberReport(
                path=path,
                source=describe(source),
                rows=len(whole),
                used=len(chosen),
                columns=tuple(chosen.column_names),
            )
            layout, rows = shape(chosen, path)
            loaded.append(_Loaded(rows=rows, layout=layout, report=report))
    return loaded


def _load(member: Member, source: ResolvedSource, *, path: str, environ: Mapping[str, str]) -> Dataset:
    located = locate(source, environ=environ)
    if located.path is not None:
        if member.config is not None or member.split != "train":
            raise refuse(
                "DatasetNotFound",
                f"{path}: config and split are for datasets on the Hub; {describe(source)} is a path: leave them out "
                "and let source name the very file or folder",
            )
        return _load_files(located.path, path=path, source=describe(source))
    return _load_from_hub(member, str(located.repo), str(located.revision), path=path)


def _load_files(target: Path, *, path: str, source: str) -> Dataset:
    import datasets
    from datasets.exceptions import DatasetsError

    files = _data_files(target, path=path, source=source)
    builder = _BUILDERS[files[0].suffix.lower()]
    if not any(file.stat().st_size for file in files):
        raise refuse("DatasetEmpty", f"{path}: there is nothing in {source}: name a file with rows")
    try:
        return datasets.load_dataset(builder, data_files=[str(file) for file in files], split="train")
    except (DatasetsError, ValueError, OSError, StopIteration) as error:  # StopIteration: JSON without a single row
        cause = error.__cause__ or error
        raise refuse(
            "DatasetNotFound",
            f"{path}: {source} cannot be read as {builder.upper() if builder != 'parquet' else 'Parquet'} "
            f"({type(cause).__name__}: {str(cause).strip().splitlines()[0][:300] if str(cause).strip() else ''}): "
            "mend what it names; every file must hold rows with the same columns",
        ) from error


def _data_files(target: Path, *, path: str, source: str) -> list[Path]:
    """Return the files of a source, sorted: the order of their rows depends on it."""
    if target.is_file():
        if target.suffix.lower() not in _BUILDERS:
            raise refuse("DatasetNotFound", f"{path}: {source} is not a {_KINDS} file: its name must end so")
        return [target]
    if not target.is_dir():
        near = difflib.get_close_matches(target.name, _names_in(target.parent), n=1)
        hint = f"did you mean {near[0]}?" if near else "check the path"
        raise refuse("DatasetNotFound", f"{path}: {source} does not exist: {hint}")
    inside = (file for file in target.rglob("*") if not any(p.startswith(".") for p in file.relative_to(target).parts))
    files = sorted(file for file in inside if file.is_file() and file.suffix.lower() in _BUILDERS)
    kinds = sorted({_BUILDERS[file.suffix.lower()] for file in files})
    if not files:
        raise refuse("DatasetNotFound", f"{path}: folder {source} holds no {_KINDS} file")
    if len(kinds) > 1:
        raise refuse(
            "DatasetNotFound",
            f"{path}: folder {source} holds files of several kinds ({', '.join(kinds)}): let source name one of the "
            "files, or a folder with one kind",
        )
    return files


def _names_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _load_from_hub(member: Member, repo: str, revision: str, *, path: str) -> Dataset:
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import LocalEntryNotFoundError

    what = f"dataset {repo} (revision {revision})"
    with hub.explained(path=path, what=what, kind="dataset"):
        try:
            # With the prefix a folder of that name in the working directory is not taken for it.
            return datasets.load_dataset(
                f"hf://datasets/{repo}", name=member.config, split=member.split, revision=revision
            )
        except DatasetNotFoundError as error:
            if " is a gated dataset" in str(error):  # it comes without its cause
                raise InvalidInputs([hub.gated(path=path, what=what)]) from error
            raise InvalidInputs([hub.not_found(path=path, what=what, kind="dataset")]) from error
        except LocalEntryNotFoundError:
            raise
        # Among these: no such config, no such split, each with the list of those there are.
        except (DatasetsError, ValueError, FileNotFoundError) as error:
            cause = error.__cause__ or error
            if isinstance(cause, OSError | hub_transport_error()) and not isinstance(cause, FileNotFoundError):
                raise cause from error
            raise refuse(
                "DatasetNotFound", f"{path}: {what}, config {member.config}, split {member.split}: {cause}"
            ) from error


def _choose(rows: Dataset, member: Member, *, path: str, seed: int) -> Dataset:
    """Apply row range, renaming, choice of columns and fraction, in this order."""
    total = len(rows)
    if member.rows is not None:
        end = total if member.rows.end is None else min(member.rows.end, total)
        if member.rows.start >= end:
            raise refuse(
                "DatasetEmpty",
                f"{path}: rows {member.rows.start} to {end} are none: the data has {total} rows; lower rows.start",
            )
        rows = rows.select(range(member.rows.start, end))
    rows = _rename(rows, member.rename or {}, path=path)
    if member.columns is not None:
        _require_columns(rows, member.columns, path=f"{path}.columns")
        rows = rows.select_columns(list(member.columns))
    if member.fraction is not None:
        taken = int(len(rows) * Decimal(member.fraction))
        if taken == 0:
            raise refuse(
                "DatasetEmpty",
                f"{path}: fraction {member.fraction} of {len(rows)} rows is no row at all: raise it, or leave the "
                "member out",
            )
        rows = rows.shuffle(seed=seed).select(range(taken))
    if len(rows) == 0:
        raise refuse("DatasetEmpty", f"{path}: there is no row in the data")
    return rows


def _rename(rows: Dataset, names: Mapping[str, str], *, path: str) -> Dataset:
    if not names:
        return rows
    _require_columns(rows, tuple(names), path=f"{path}.rename")
    kept = [column for column in rows.column_names if column not in names]
    result = [*kept, *names.values()]
    twice = sorted({name for name in result if result.count(name) > 1})
    if twice:
        raise refuse(
            "DatasetColumnMissing",
            f"{path}.rename: there would be two columns {', '.join(twice)}: rename the other one too, to a name that "
            "is not used",
        )
    return rows.rename_columns(dict(names))


def _require_columns(rows: Dataset, wanted: Sequence[str], *, path: str) -> None:
    missing = [column for column in wanted if column not in rows.column_names]
    if not missing:
        return
    near = [match for column in missing for match in difflib.get_close_matches(column, rows.column_names, n=1)]
    hint = f"did you mean {near[0]}?" if near else "name one of them"
    raise refuse(
        "DatasetColumnMissing",
        f"{path}: there is no column {', '.join(missing)}; the data has {', '.join(rows.column_names)}: {hint}",
    )


# --- All of them -----------------------------------------------------------------------------------------------------


def _differing_columns(loaded: Sequence[_Loaded], *, field: str) -> list[Problem]:
    """Return a problem where members have other columns than the first one."""
    if not loaded:
        return []
    first = loaded[0].report
    problems = []
    for member in loaded[1:]:
        ours, theirs = set(first.columns), set(member.report.columns)
        if ours == theirs:
            continue
        common = [column for column in first.columns if column in theirs]
        fix = (
            f"select the common ones with spec.{field}[].columns: [{', '.join(common)}]"
            if common
            else f"rename columns with spec.{field}[].rename until they agree"
        )
        problems.append(
            Problem(
                "DatasetColumnsDiffer",
                f"{first.path} has the columns {', '.join(sorted(ours))}; {member.report.path} has "
                f"{', '.join(sorted(theirs))}: {fix}",
            )
        )
    return problems


def _mix(loaded: Sequence[_Loaded], *, seed: int, field: str) -> Dataset:
    import datasets

    first = loaded[0].rows
    same = [first]
    for member in loaded[1:]:
        try:
            same.append(member.rows if member.rows.features == first.features else member.rows.cast(first.features))
        except (TypeError, ValueError) as error:
            raise refuse(
                "DatasetColumnsDiffer",
                f"spec.{field}: {member.report.path} has the columns of {loaded[0].report.path} with other types "
                f"({first.features} and {member.rows.features}): select the columns that agree",
            ) from error
    return datasets.concatenate_datasets(same).shuffle(seed=seed)


def _split(rows: Dataset, fraction: str, *, seed: int) -> tuple[Dataset, Dataset]:
    if Decimal(fraction) == 1 or len(rows) < 2:
        raise refuse(
            "DatasetEmpty",
            f"spec.testFraction {fraction} of {len(rows)} rows leaves none to train on: lower it, or add data",
        )
    parts = rows.train_test_split(test_size=float(fraction), seed=seed)
    if len(parts["train"]) == 0:
        raise refuse("DatasetEmpty", f"spec.testFraction {fraction} of {len(rows)} rows leaves none to train on")
    return parts["train"], parts["test"]
