"""What a person asks for with `posttrain run FILE`: the file, the options, and the checked resource in them.

It owns the way from the command line to a TrainingRun that this machine can execute; it must not write anything.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.api.loader import Document
from posttrain.api.training_run import TrainingRun
from posttrain.api.validate import parse_training_run
from posttrain.errors import InvalidResource
from posttrain.files import add_lines, assign, find_run, read_documents
from posttrain.local.machine import Machine, local_settings
from posttrain.local.preflight import Given, find_local_problems, read_code, read_secrets, resolve_paths
from posttrain.plan.checks import find_spec_problems
from posttrain.settings import Settings

_FOLDER_MARK = ".."


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `posttrain run`, as they were given."""

    file: Path
    sets: Sequence[str]
    claims: Mapping[str, Path]
    secrets: Mapping[str, Path]
    state: Path | None
    """The folder of all runs; None for the one that is taken without an option."""

    @property
    def command(self) -> str:
        """The command line that says the same again."""
        words = ["posttrain", "run", str(self.file)]
        for text in self.sets:
            words += ["--set", text]
        for option, folders in (("--claim", self.claims), ("--secret", self.secrets)):
            for name, folder in folders.items():
                words += [option, f"{name}={folder}"]
        if self.state is not None:
            words += ["--state", str(self.state)]
        return shlex.join(words)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run that this machine can execute, and what it is executed with."""

    run: TrainingRun
    settings: Settings
    claims: Mapping[str, Path]
    config_maps: Mapping[str, Mapping[str, str]]
    """ConfigMaps of the file, and the run's own code under its path."""
    secrets: Mapping[str, Mapping[str, str]]


def load_request(options: Options, *, machine: Machine) -> Request:
    """Return what a file and the options ask for.

    Raises:
        UserError: with every problem that can be seen before anything is started.
    """
    documents = read_documents(options.file)
    document = find_run(documents, file=options.file)
    data = resolve_paths(assign(document.data, sets=options.sets), folder=options.file.absolute().parent)
    run = parse_training_run(data, origin=document.origin, line_of=document.line_of)
    resources = run.spec.resources
    settings = local_settings(machine, profile=resources.profile, num_nodes=resources.num_nodes)
    claims = {name: folder.absolute() for name, folder in options.claims.items()}
    config_maps = _config_maps(documents)
    given = Given(claims=claims, secrets=options.secrets, config_maps=config_maps)
    problems = [
        *find_spec_problems(run.spec, settings=settings),
        *find_local_problems(run.spec, machine=machine, given=given),
    ]
    if problems:
        raise InvalidResource(add_lines(problems, document=document), origin=document.origin)
    code = run.spec.code
    if code is not None and code.path is not None:
        files = read_code(Path(code.path))
        config_maps[code.path] = {path.replace("/", _FOLDER_MARK): text for path, text in files.items()}
    return Request(
        run=run,
        settings=settings,
        claims=claims,
        config_maps=config_maps,
        secrets=read_secrets(options.secrets),
    )


def _config_maps(documents: Sequence[Document]) -> dict[str, Mapping[str, str]]:
    """Return the data of the ConfigMaps beside the run, by name."""
    return {
        str(document.data["metadata"]["name"]): document.data.get("data", {})
        for document in documents
        if document.data.get("kind") == "ConfigMap" and "name" in document.data.get("metadata", {})
    }
