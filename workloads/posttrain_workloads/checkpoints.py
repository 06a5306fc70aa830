"""Checkpoints that count: hashed, fsynced and marked in the background, verified before they are used.

It owns the marker, its verification and the rotation; it must not import torch, nor know when a checkpoint is due.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from posttrain.contract.checkpoints import CHECKPOINT_PREFIX, MARKER_NAME, MarkedFile, Marker, checkpoint_folder
from posttrain.contract.facts import CheckpointSkipped
from posttrain.contract.result import ExitCode
from posttrain_workloads.runtime import RankFailure

logger = logging.getLogger(__name__)

_NEW = ".new"
"""How the name of a file ends until all of it is on the disk."""
_NO_CONTENT = re.compile(rf"(?:{re.escape(MARKER_NAME)}|\.rank-\d+\.json)(?:{re.escape(_NEW)})?")
"""The marker and its parts."""
_PARTS = TypeAdapter(tuple[MarkedFile, ...])
# Files that a rank other than 0 writes: transformers' RNG states and our own, DeepSpeed's and FSDP's shards.
_OWNER = re.compile(r"(?:^|/)(?:rng_state_|logging_state_|(?:\w+_)?zero_pp_rank_|__)(\d+)(?=[._])")
_PART_POLL_SECONDS = 0.02
_VERIFY_THREADS = 4
_SHARDED = frozenset({"ZeRO1", "ZeRO2", "ZeRO3", "FSDP"})


# --- Writing ---------------------------------------------------------------------------------------------------------


class CheckpointKeeper:
    """One rank's part in making checkpoints count; rank 0 writes the marker and removes older ones."""

    def __init__(
        self,
        storage: Path,
        *,
        rank: int,
        world_size: int,
        strategy: str,
        config_hash: str,
        keep_last: int,
        on_marked: Callable[[Path, Marker], None],
    ) -> None:
        self._storage = storage
        self._rank = rank
        self._world_size = world_size
        self._strategy = strategy
        self._config_hash = config_hash
        self._keep_last = keep_last
        self._on_marked = on_marked
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def finalise(self, step: int) -> None:
        """Begin to hash, fsync and mark the checkpoint of a step, of which every rank has written every file."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(step,), name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the checkpoint that is being finalised.

        Raises:
            OSError: it could not be finalised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what went wrong in the background, if anything has."""
        if self._error is not None:
            raise self._error

    def _run(self, step: int) -> None:
        try:
            self._finalise(step)
        except BaseException as error:  # raised again in the training thread, by `check`
            self._error = error

    def _finalise(self, step: int) -> None:
        folder = self._storage / checkpoint_folder(step)
        own = [path for path in list_files(folder) if owner_of(path, world_size=self._world_size) == self._rank]
        part = _PARTS.dump_json(tuple(seal_files(folder, own)))
        _write_durably(folder / f".rank-{self._rank}.json", part)
        if self._rank != 0:
            return
        files = self._collect(folder)
        marker = self.mark(folder, files, step=step)
        for rank in range(self._world_size):
            (folder / f".rank-{rank}.json").unlink()
        self._on_marked(folder, marker)
        rotate(self._storage, keep_last=self._keep_last)

    def _collect(self, folder: Path) -> list[MarkedFile]:
        """Wait for every rank's part. A rank that fails to write its own fails, and with it the gang."""
        files: list[MarkedFile] = []
        for rank in range(self._world_size):
            part = folder / f".rank-{rank}.json"
            while not part.exists():
                time.sleep(_PART_POLL_SECONDS)
            files += _PARTS.validate_json(part.read_bytes())
        return files

    def mark_model(self, folder: Path, *, step: int) -> None:
        """Hash, fsync and mark the folder of the trained model, all of which rank 0 has written."""
        self.mark(folder, seal_files(folder, list_files(folder)), step=step)

    def mark(self, folder: Path, files: Iterable[MarkedFile], *, step: int) -> Marker:
        """Write the marker over a folder's sealed files."""
        marker = build_marker(
            files, step=step, world_size=self._world_size, strategy=self._strategy, config_hash=self._config_hash
        )
        write_marker(folder, marker)
        return marker


def owner_of(path: str, *, world_size: int) -> int:
    """Return the rank that wrote a file of a checkpoint: the one in its name, else 0.

    A file must be fsynced on the node that wrote it.
    """
    match = _OWNER.search(path)
    rank = int(match[1]) if match else 0
    return rank if rank < world_size else 0


def list_files(folder: Path) -> list[str]:
    """Return the relative paths of a folder's files, without the marker and its parts.

    Nor those that another rank is about to give their names: they are gone before they are read.
    """
    paths = (file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    names = (file.relative_to(folder).as_posix() for file in paths)
    return sorted(name for name in names if not _NO_CONTENT.fullmatch(name))


def seal_files(folder: Path, paths: Iterable[str]) -> list[MarkedFile]:
    """Bring files to the disk, and return their sizes and hashes.

    Each becomes as readable as the folder: safetensors writes files that only their owner may read, and whoever shares
    the claim is another user.
    """
    readable = folder.stat().st_mode & 0o444
    sealed = []
    for path in paths:
        with (folder / path).open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode | readable != mode:
                os.fchmod(file.fileno(), mode | readable)
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            sealed.append(MarkedFile(path=path, bytes=file.tell(), sha256=digest))
    return sealed


def build_marker(files: Iterable[MarkedFile], *, step: int, world_size: int, strategy: str, config_hash: str) -> Marker:
    """Return the marker over all files of a folder."""
    ordered = tuple(sorted(files, key=lambda file: file.path))
    return Marker(
        step=step,
        world_size=world_size,
        strategy=strategy,
        config_hash=config_hash,
        files=ordered,
        digest=digest_of(ordered),
    )


def digest_of(files: Iterable[MarkedFile]) -> str:
    """Return the digest over the sorted `path sha256` lines."""
    lines = sorted(f"{file.path} {file.sha256}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_marker(folder: Path, marker: Marker) -> None:
    """Make the folder count: from the moment that the marker has its name."""
    for inner in {(folder / file.path).parent for file in marker.files} - {folder}:
        _sync_folder(inner)
    _write_durably(folder / MARKER_NAME, marker.model_dump_json(indent=1).encode())
    _sync_folder(folder.parent)


def rotate(storage: Path, *, keep_last: int) -> None:
    """Remove all marked checkpoints but the newest `keep_last`; at least one stays."""
    for step in sorted(_marked_steps(storage), reverse=True)[max(keep_last, 1) :]:
        try:
            remove_checkpoint(storage / checkpoint_folder(step))
        except OSError as error:  # a file that somebody has open on NFS: no reason to end a training
            logger.warning("checkpoint of step %s could not be removed: %s", step, error)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; one that is half removed does not count."""
    (folder / MARKER_NAME).unlink(missing_ok=True)
    _sync_folder(folder)
    shutil.rmtree(folder)


def _write_durably(target: Path, content: bytes) -> None:
    temporary = target.with_name(f"{target.name}{_NEW}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- Reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Found:
    """The checkpoint to go on from, if there is one, and those that were passed over."""

    path: Path | None
    step: int
    skipped: tuple[CheckpointSkipped, ...]


def newest_verified(storage: Path, *, world_size: int, strategy: str) -> Found:
    """Return the newest checkpoint whose every file is as it was written, and put the others out of the way.

    A folder without a marker is removed, a corrupt one renamed to `corrupt-checkpoint-<step>`.

    Raises:
        RankFailure: checkpoints were complete once and none of them is whole any more, or the newest one cannot be
            resumed with this gang. Nothing was moved or removed then.
    """
    marked = sorted(_marked_steps(storage), reverse=True)
    corrupt: dict[int, str] = {}
    chosen: Marker | None = None
    for step in marked:
        verified = verify_folder(storage / checkpoint_folder(step))
        if isinstance(verified, Marker):
            chosen = verified
            break
        corrupt[step] = verified
    if chosen is None and corrupt:
        listed = "; ".join(f"{checkpoint_folder(step)}: {problem}" for step, problem in corrupt.items())
        raise RankFailure("CheckpointCorrupt", f"no checkpoint is whole: {listed}", exit_code=ExitCode.INVALID)
    if chosen is not None:
        _refuse_other_gang(chosen, world_size=world_size, strategy=strategy)

    skipped = []
    for step in sorted(_steps(storage) - set(marked)):
        shutil.rmtree(storage / checkpoint_folder(step))
        skipped.append(CheckpointSkipped(step=step, reason="it has no marker: its writing was interrupted"))
    for step, problem in corrupt.items():
        folder = storage / checkpoint_folder(step)
        aside = storage / f"corrupt-{folder.name}"
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        skipped.append(CheckpointSkipped(step=step, reason=f"{problem}; moved to {aside.name}"))
    return Found(
        path=storage / checkpoint_folder(chosen.step) if chosen else None,
        step=chosen.step if chosen else 0,
        skipped=tuple(skipped),
    )


def verify_folder(folder: Path) -> Marker | str:
    """Return the marker of a folder if every file is as it says, else what is wrong."""
    try:
        marker = Marker.model_validate_json((folder / MARKER_NAME).read_bytes())
    except (OSError, ValidationError) as error:
        return f"its marker cannot be read ({str(error).splitlines()[0]})"
    if digest_of(marker.files) != marker.digest:
        return "its marker contradicts itself"
    for file in marker.files:  # sizes first: they cost nothing
        path = folder / file.path
        if not path.is_file():
            return f"{file.path} is missing"
        if (size := path.stat().st_size) != file.bytes:
            return f"{file.path} has {size} bytes and was written with {file.bytes}"
    with ThreadPoolExecutor(_VERIFY_THREADS) as pool:
        for file, digest in zip(marker.files, pool.map(lambda f: _digest(folder / f.path), marker.files), strict=True):
            if digest != file.sha256:
                return f"{file.path} is not what was written: its sha256 differs"
    return marker


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_other_gang(marker: Marker, *, world_size: int, strategy: str) -> None:
    name = checkpoint_folder(marker.step)
    if marker.strategy != strategy:
        raise RankFailure(
            "CheckpointUnusable",
            f"{name} was written with {marker.strategy} and cannot be resumed with {strategy}",
            exit_code=ExitCode.INVALID,
            advice=f"Set spec.parallelism.strategy back to {marker.strategy}, or start anew under another name.",
        )
    if strategy in _SHARDED and marker.world_size != world_size:
        raise RankFailure(
            "CheckpointUnusable",
            f"{name} was written by {marker.world_size} ranks with {strategy}, which shards it by rank, and cannot be "
            f"resumed by {world_size}",
            exit_code=ExitCode.INVALID,
            advice=f"Set spec.resources back to {marker.world_size} ranks, or start anew under another name.",
        )


def _steps(storage: Path) -> set[int]:
    names = (folder.name.removeprefix(CHECKPOINT_PREFIX) for folder in storage.glob(f"{CHECKPOINT_PREFIX}*"))
    return {int(name) for name in names if name.isdecimal()}


def _marked_steps(storage: Path) -> set[int]:
    return {step for step in _steps(storage) if (storage / checkpoint_folder(step) / MARKER_NAME).exists()}
