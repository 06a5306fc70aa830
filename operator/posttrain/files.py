"""Files with resources: from a path to checked TrainingRuns, every problem with its line.

It owns what may stand in such a file; it must not look at this machine, nor write anything.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.api.args import check_deprecated
from posttrain.api.loader import Document, apply_assignment, format_path, load_documents, parse_assignment
from posttrain.api.methods import args_path, table_of
from posttrain.api.training_run import KIND, TrainingRun
from posttrain.api.validate import Checked, check_training_run
from posttrain.errors import InvalidResource, Problem, UserError
from posttrain.plan.checks import find_spec_problems
from posttrain.settings import Profile, Settings


def read_documents(file: Path) -> list[Document]:
    """Return the documents of a file.

    Raises:
        UserError: it cannot be read, or is not YAML.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: {os.strerror(error.errno or 0)}: name a YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}: save the file as UTF-8") from None
    return load_documents(text, origin=str(file))


def find_runs(documents: Sequence[Document], *, file: Path) -> list[Document]:
    """Return all documents but the ConfigMaps with own code that may stand beside a run.

    What is of another kind is taken for a run too: its problems then say what is wrong with it.

    Raises:
        UserError: there is none.
    """
    found = [document for document in documents if document.data.get("kind") != "ConfigMap"]
    if not found:
        raise UserError(f"{file}: there is no {KIND} in it")
    return found


def assign_to_runs(documents: Sequence[Document], *, sets: Sequence[str], file: Path) -> list[dict[str, Any]]:
    """Return the resources with every `PATH=VALUE` applied in turn; where they are several, `NAME:PATH=VALUE`.

    Raises:
        LoadError: an assignment cannot be read or has no place.
        UserError: two runs have one name, or it is left open which one is meant.
    """
    names = [name_of(document) for document in documents]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{file}: two runs have the name {twice!r}: give each a metadata.name of its own")
    changed = {name: dict(document.data) for name, document in zip(names, documents, strict=True)}
    for text in sets:
        name, _, assignment = text.partition(":") if len(names) > 1 else (names[0], "", text)
        if name not in changed:
            raise UserError(
                f"--set {text}: {file} holds the runs {', '.join(names)}: say which one is meant, as in "
                f"--set {names[0]}:{text}"
            )
        path, value = parse_assignment(assignment)
        changed[name] = apply_assignment(changed[name], path=path, value=value)
    return list(changed.values())


def name_of(document: Document) -> str:
    """Return the name that a document gives its resource; nothing where it has none."""
    metadata = document.data.get("metadata")
    return str(metadata.get("name", "")) if isinstance(metadata, dict) else ""


def check_run(document: Document, *, data: Mapping[str, Any], settings: Settings | None = None) -> TrainingRun:
    """Return the run that `data` is, a document perhaps changed since it was read.

    Without settings those of a cluster are assumed that has whatever profile the run names, and a machine whose files
    it may read.

    Raises:
        InvalidResource: with every problem that can be seen without looking further than the file.
    """
    checked = check_training_run(data, line_of=document.line_of)
    run = checked.run
    found = find_spec_problems(run.spec, settings=settings or assume_settings(run)) if run is not None else []
    problems = add_to_problems(checked, found, document=document)
    if run is None or problems:
        raise InvalidResource(problems, origin=document.origin)
    return run


def add_to_problems(checked: Checked, found: Sequence[Problem], *, document: Document) -> tuple[Problem, ...]:
    """Return the problems of a resource with those `found` in what is valid of it, in the order of their lines."""
    sure = [problem for problem in found if not checked.is_in_doubt(problem.path)]
    problems = [*checked.problems, *add_lines(sure, document=document)]
    return tuple(sorted(problems, key=lambda problem: problem.line or 0))


def assume_settings(run: TrainingRun) -> Settings:
    """Return the default settings with the profile that a run names."""
    profiles = {"default": Profile(), run.spec.resources.profile or "default": Profile()}
    return Settings(profiles=profiles, allow_file_sources=True)


def find_warnings(run: TrainingRun, *, document: Document) -> tuple[Problem, ...]:
    """Return what is allowed and yet better changed."""
    spec = run.spec
    remarks = check_deprecated(spec.training.args, table_of(spec.method))
    path = ".".join(args_path(spec.method))
    return add_lines(
        [Problem(path=f"{path}.{remark.key}", message=remark.message) for remark in remarks],
        document=document,
    )


def add_lines(problems: Sequence[Problem], *, document: Document) -> tuple[Problem, ...]:
    """Return problems with the line of the value, or of the nearest thing around it that is written at all."""
    lines = {format_path(path): line for path, line in document.lines.items()}

    def line_of(path: str) -> int | None:
        while path not in lines and path:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return lines.get(path)

    return tuple(Problem(path=p.path, message=p.message, line=p.line or line_of(p.path)) for p in problems)
