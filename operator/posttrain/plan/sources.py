"""Sources: from the text in the spec to a Hub repository or a path inside a mount, and which mounts that takes.

It owns how a source is read; it must not look whether anything is there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

from posttrain.api.training_run import TrainingRunSpec
from posttrain.contract.config import HubSource, MountedSource, ResolvedSource
from posttrain.errors import Problem

FILES_MOUNT = "files"
_CLAIM_PREFIX = "claim-"
_CLAIM_SCHEME = "pvc://"
_DEFAULT_REVISION = "main"
_COMMIT = re.compile(r"^[0-9a-f]{40}$")


@dataclass(frozen=True, kw_only=True)
class NamedSource:
    """A source, what the config and provenance call it (`model`, `datasets/0`), and where it stands in the spec."""

    key: str
    path: str
    source: str
    revision: str | None


def named_sources(spec: TrainingRunSpec, *, model_source: str | None = None) -> tuple[NamedSource, ...]:
    """Return every source of the spec: the model, then the datasets, then the evaluation datasets.

    A model that another run ends with has none of its own: it is the given one, or left out.
    """
    source = spec.model.source or model_source
    models = (
        [NamedSource(key="model", path="spec.model", source=source, revision=spec.model.revision)] if source else []
    )
    members = [
        NamedSource(key=f"{field}/{i}", path=f"spec.{field}[{i}]", source=member.source, revision=member.revision)
        for field, group in (("datasets", spec.datasets), ("evalDatasets", spec.eval_datasets))
        for i, member in enumerate(group)
    ]
    return (*models, *members)


def resolve_source(source: str, *, revision: str | None) -> ResolvedSource:
    """Return what a source's text stands for.

    Raises:
        ValueError: the text is no source; the message says what to write.
    """
    if source.startswith("file://"):
        path = source.removeprefix("file://")
        if not path.startswith("/"):
            raise ValueError(f"{source} must have an absolute path here: write file:// and a path that begins with /")
        return _mounted(FILES_MOUNT, path.lstrip("/"), source=source)
    if source.startswith(_CLAIM_SCHEME):
        claim, path = split_claim(source)
        if not claim or not path:
            raise ValueError(f"{source} lacks a claim or a path: write pvc://claim/path")
        return _mounted(claim_mount(claim), path, source=source)
    repo = source.removeprefix("hf://")
    if "://" in repo:
        raise ValueError(f"{source} is of a kind that does not exist: write org/name, hf://, pvc:// or file://")
    return HubSource(repo=repo, revision=revision or _DEFAULT_REVISION)


def split_claim(source: str) -> tuple[str, str]:
    """Return the claim and the path of `pvc://claim/path`."""
    claim, _, path = source.removeprefix(_CLAIM_SCHEME).partition("/")
    return claim, path


def _mounted(mount: str, path: str, *, source: str) -> MountedSource:
    if ".." in path.split("/"):
        raise ValueError(f"{source} leaves its root: write the path without `..`")
    return MountedSource(mount=mount, path=path)


def claim_mount(claim: str) -> str:
    """Return the name of the mount of a claim that is read."""
    return _CLAIM_PREFIX + claim


def find_source_problems(spec: TrainingRunSpec, *, allow_files: bool) -> list[Problem]:
    """Return what is wrong with the sources of a spec."""
    problems = []
    for named in named_sources(spec):
        try:
            resolved = resolve_source(named.source, revision=named.revision)
        except ValueError as error:
            problems.append(Problem(path=f"{named.path}.source", message=str(error)))
            continue
        if isinstance(resolved, HubSource):
            continue
        if named.revision is not None:
            problems.append(
                Problem(path=f"{named.path}.revision", message="only what lies on the Hub has revisions: leave it out")
            )
        if resolved.mount == FILES_MOUNT and not allow_files:
            problems.append(
                Problem(
                    path=f"{named.path}.source",
                    message="file:// means this machine, which only a local run has (`posttrain run`): "
                    "put it on a claim and write pvc://claim/path, or on the Hub",
                )
            )
    return problems


def resolve_all(
    spec: TrainingRunSpec, *, commits: Mapping[str, str], model_source: str | None
) -> dict[str, ResolvedSource]:
    """Return every source by its key, a Hub revision replaced by its commit where that is known.

    `model_source` is where the model lies that another run ended with.
    """
    return {
        named.key: resolve_source(named.source, revision=commits.get(named.key, named.revision))
        for named in named_sources(spec, model_source=model_source)
    }


def read_claims(sources: Mapping[str, ResolvedSource]) -> tuple[str, ...]:
    """Return the names of the claims that the sources lie on."""
    mounts = {s.mount for s in sources.values() if isinstance(s, MountedSource) and s.mount != FILES_MOUNT}
    return tuple(sorted(mount.removeprefix(_CLAIM_PREFIX) for mount in mounts))


def reads_files(sources: Mapping[str, ResolvedSource]) -> bool:
    """Return whether a source lies on the machine itself."""
    return any(isinstance(s, MountedSource) and s.mount == FILES_MOUNT for s in sources.values())


def uses_hub(sources: Mapping[str, ResolvedSource]) -> bool:
    """Return whether a source lies on the Hub."""
    return any(isinstance(s, HubSource) for s in sources.values())


def is_commit(source: ResolvedSource) -> TypeGuard[HubSource]:
    """Return whether a source lies on the Hub and its revision is a commit."""
    return isinstance(source, HubSource) and _COMMIT.fullmatch(source.revision) is not None


def moving_sources(sources: Mapping[str, ResolvedSource]) -> tuple[str, ...]:
    """Return the keys of the Hub sources whose revision is not a commit yet."""
    return tuple(key for key, source in sources.items() if isinstance(source, HubSource) and not is_commit(source))
