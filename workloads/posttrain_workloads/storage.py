"""The storage folder of a run: whose it is, and the URIs of what lies in it.

It owns run.json and the URIs; it must not know what a checkpoint or a fact looks like.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from posttrain.contract import checkpoints
from posttrain.contract.checkpoints import CHECKPOINT_PREFIX, MODEL_FOLDER
from posttrain.contract.config import TrainingConfig
from posttrain_workloads.reporting import FACTS_FILES

_RUN = "run.json"


class StorageHoldsAnotherRun(Exception):
    """The folder was written by a run with another spec."""


def claim_storage(storage: Path, config: TrainingConfig) -> None:
    """Make the folder this run's, or see that it is; nodes may do so at the same moment.

    A run that left neither a checkpoint nor a model gives way to the next one of its name: its prepare found a problem
    that was mended since, or its gang failed before it had done anything.

    Raises:
        StorageHoldsAnotherRun: it is another run's; nothing was written.
    """
    file = storage / _RUN
    if not file.exists():
        storage.mkdir(parents=True, exist_ok=True)
        temporary = _write_identity(storage, config)
        try:
            os.link(temporary, file)
        except FileExistsError:
            pass  # another node was first; what it wrote is checked below
        finally:
            temporary.unlink()
    known = json.loads(file.read_text())
    if known["configHash"] == config.config_hash:
        return
    if _has_results(storage):
        raise StorageHoldsAnotherRun(
            f"the storage of {config.run.name} ({storage_uri(config, '')}) holds the results of {known['name']} with "
            f"another spec ({known['configHash']}, now {config.config_hash}): it was changed in a field that cannot "
            "change while a run lives"
        )
    # The facts are numbered from one: those of the other run would stand in the way of this one's.
    for facts in storage.glob(FACTS_FILES):
        facts.unlink(missing_ok=True)
    _write_identity(storage, config).replace(file)


def _write_identity(storage: Path, config: TrainingConfig) -> Path:
    """Write down whose the folder is, under a temporary name, and return that."""
    temporary = storage / f".{_RUN}.{config.attempt}.{os.uname().nodename}.{os.getpid()}"
    with temporary.open("w") as out:
        json.dump({"name": config.run.name, "configHash": config.config_hash}, out)
        out.flush()
        os.fsync(out.fileno())
    return temporary


def _has_results(storage: Path) -> bool:
    return any(storage.glob(f"*{CHECKPOINT_PREFIX}*")) or (storage / MODEL_FOLDER).exists()


def storage_uri(config: TrainingConfig, path: str) -> str:
    """Return the URI of a file or folder of the run's storage."""
    return checkpoints.storage_uri(config.run.name, path=path, claim_name=config.spec.checkpoints.storage.claim_name)
