"""Checkpoint and model folders: their names, their URIs, and the marker that makes one count.

It owns these names and the marker's shape; it must not read or write any file.
"""

from __future__ import annotations

from posttrain.contract.config import ContractModel

MARKER_NAME = ".posttrain-complete.json"
"""Written last, by rank 0: a folder without it is not a checkpoint."""
CHECKPOINT_PREFIX = "checkpoint-"
MODEL_FOLDER = "model"


class MarkedFile(ContractModel):
    """One file of a marked folder; `path` is relative to it."""

    path: str
    bytes: int
    sha256: str


class Marker(ContractModel):
    """The content of the marker."""

    schema_version: int = 1
    step: int
    world_size: int
    strategy: str
    config_hash: str
    files: tuple[MarkedFile, ...]
    digest: str
    """sha256 over the sorted `path sha256` lines."""


def checkpoint_folder(step: int) -> str:
    """Return the name of a step's folder."""
    return f"{CHECKPOINT_PREFIX}{step}"


def storage_uri(run: str, *, path: str, claim_name: str | None) -> str:
    """Return the URI of a file or folder of a run's storage. The claim made for a run bears the run's name."""
    return f"pvc://{claim_name or run}/{run}/{path}"
