"""The storage folder of a run: whose it is, and the URIs of what lies in it.

It owns run.json and the URIs; it must not know what a checkpoint or a fact looks like.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from posttrain.contract import checkpoints
from posttrain.contract.config import TrainingConfig

_RUN = "run.json"


class StorageHoldsAnotherRun(Exception):
    """The folder was written by a run with another spec."""


def claim_storage(storage: Path, config: TrainingConfig) -> None:
    """Make the folder this run's, or see that it is; nodes may do so at the same moment.

    Raises:
        StorageHoldsAnotherRun: it is another run's; nothing was written.
    """
    file = storage / _RUN
    if not file.exists():
        storage.mkdir(parents=True, exist_ok=True)
        temporary = storage / f".{_RUN}.{config.attempt}.{os.uname().nodename}.{os.getpid()}"
        with temporary.open("w") as out:
            json.dump({"name": config.run.name, "configHash": config.config_hash}, out)
            out.flush()
            os.fsync(out.fileno())
        try:
            os.link(temporary, file)
        except FileExistsError:
            pass  # another node was first; what it wrote is checked below
        finally:
            temporary.unlink()
    known = json.loads(file.read_text())
    if known["configHash"] != config.config_hash:
        raise StorageHoldsAnotherRun(
            f"the storage of {config.run.name} ({storage_uri(config, '')}) holds the results of {known['name']} with "
            f"another spec ({known['configHash']}, now {config.config_hash}): it was changed in a field that cannot "
            "change while a run lives"
        )


def storage_uri(config: TrainingConfig, path: str) -> str:
    """Return the URI of a file or folder of the run's storage."""
    return checkpoints.storage_uri(config.run.name, path=path, claim_name=config.spec.checkpoints.storage.claim_name)
