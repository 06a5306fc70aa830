"""Where a source lies for this process: a path in a mount, or a repository on the Hub.

It owns the step from config.json to this machine's paths; it must not open what it finds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from posttrain.contract.config import HubSource, MountedSource, ResolvedSource
from posttrain.contract.environment import resolve_mounted


@dataclass(frozen=True)
class Located:
    """Either `path`, or `repo` with its `revision`."""

    path: Path | None = None
    repo: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.path is not None else f"hf://{self.repo}@{self.revision}"


def locate(source: ResolvedSource, *, environ: Mapping[str, str]) -> Located:
    """Return where a source lies.

    Raises:
        KeyError: the mount's variable is not set: the plan and this process disagree.
        ValueError: the path leaves its mount.
    """
    if isinstance(source, HubSource):
        return Located(repo=source.repo, revision=source.revision)
    return Located(path=resolve_mounted(source.mount, source.path, environ=environ))


def describe(source: ResolvedSource) -> str:
    """Return a source as a person wrote it, or nearly so."""
    match source:
        case HubSource():
            return f"{source.repo} (revision {source.revision})"
        case MountedSource(mount="files"):
            return f"file:///{source.path}"
        case MountedSource():
            return f"pvc://{source.mount.removeprefix('claim-')}/{source.path}"
