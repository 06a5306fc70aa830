"""What a person asks for with `posttrain run FILE`: the file, the options, and the checked resources in them.

It owns the way from the command line to TrainingRuns that this machine can execute, and their order; it must not write
anything.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from posttrain.api.loader import Document
from posttrain.api.training_run import TrainingRun
from posttrain.api.validate import check_training_run
from posttrain.errors import InvalidResource, Problem, UserError
from posttrain.files import add_to_problems, assign_to_runs, find_runs, name_of, read_documents
from posttrain.local.machine import Machine, local_settings
from posttrain.local.needs import find_gpu_problems, needed_environments
from posttrain.local.preflight import Given, find_local_problems, read_code, read_secrets, resolve_paths
from posttrain.local.references import find_reference_problems
from posttrain.plan.checks import find_spec_problems
from posttrain.plan.training_run import preview_training_run
from posttrain.plan.types import Manifest
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
    environments: tuple[str, ...]
    """The environments that its pods run in."""


def load_requests(options: Options, *, machine: Machine, state_root: Path) -> tuple[Request, ...]:
    """Return what a file and the options ask for: its runs, each after the one that it starts from.

    `state_root` is the folder of all runs, in which those are that the file refers to and does not hold.

    Raises:
        UserError: with every problem that can be seen before anything is started.
    """
    documents = read_documents(options.file)
    found = find_runs(documents, file=options.file)
    changed = assign_to_runs(found, sets=options.sets, file=options.file)
    names = [name_of(document) for document in found]
    given = Given(
        claims={name: folder.absolute() for name, folder in options.claims.items()},
        secrets=options.secrets,
        config_maps=_config_maps(documents),
    )
    runs: list[tuple[TrainingRun, Settings, tuple[Manifest, ...]]] = []
    problems: list[Problem] = []
    for document, data in zip(found, changed, strict=True):
        resolved = resolve_paths(data, folder=options.file.absolute().parent)
        checked = check_training_run(resolved, line_of=document.line_of)
        run = checked.run
        if run is None:
            problems += checked.problems
            continue
        resources = run.spec.resources
        settings = local_settings(machine, profile=resources.profile, num_nodes=resources.num_nodes)
        seen = [
            *find_spec_problems(run.spec, settings=settings),
            *find_local_problems(run.spec, machine=machine, given=given),
            *find_reference_problems(run.spec, state_root=state_root, beside=names),
        ]
        # Only of a spec without problems it is known what it becomes.
        whole = not checked.problems and not seen
        objects = preview_training_run(run, now=datetime.now(UTC), settings=settings) if whole else ()
        resource = settings.profiles[settings.default_profile].gpu_resource
        seen += find_gpu_problems(objects, machine=machine, resource=resource)
        problems += add_to_problems(checked, seen, document=document)
        runs.append((run, settings, objects))
    if problems:
        raise InvalidResource(tuple(problems), origin=str(options.file))
    secrets = read_secrets(options.secrets)
    requests = [
        Request(
            run=run,
            settings=settings,
            claims=given.claims,
            config_maps={**given.config_maps, **_own_code(run)},
            secrets=secrets,
            environments=needed_environments(objects, images=settings.images),
        )
        for run, settings, objects in runs
    ]
    return tuple(_in_order(requests))


def _own_code(run: TrainingRun) -> dict[str, Mapping[str, str]]:
    """Return the files of a run's folder of own code as a ConfigMap would hold them, under the folder's path."""
    code = run.spec.code
    if code is None or code.path is None:
        return {}
    return {code.path: {path.replace("/", _FOLDER_MARK): text for path, text in read_code(Path(code.path)).items()}}


def _in_order(requests: Sequence[Request]) -> Iterator[Request]:
    """Yield each run after the one that it starts from, else as they stand in the file.

    Raises:
        UserError: they start from each other.
    """
    waiting = {request.run.metadata.name: request for request in requests}
    while waiting:
        ready = [name for name, request in waiting.items() if _refers_to(request) not in waiting]
        if not ready:
            circle = " and ".join(f"{name} from {_refers_to(request)}" for name, request in waiting.items())
            raise UserError(f"runs start from each other ({circle}): one of them must begin with a model.source")
        yield waiting.pop(ready[0])


def _refers_to(request: Request) -> str | None:
    reference = request.run.spec.model.run_ref
    return reference.name if reference is not None else None


def _config_maps(documents: Sequence[Document]) -> dict[str, Mapping[str, str]]:
    """Return the data of the ConfigMaps beside the run, by name."""
    return {
        str(document.data["metadata"]["name"]): document.data.get("data", {})
        for document in documents
        if document.data.get("kind") == "ConfigMap" and "name" in document.data.get("metadata", {})
    }
