"""Checkpoints: what the marker says, what is verified, what is removed, and what happens in between."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path

import pytest

from posttrain.contract.checkpoints import Marker
from posttrain_workloads.checkpoints import (
    CheckpointKeeper,
    Found,
    list_files,
    newest_verified,
    owner_of,
    verify_folder,
)
from posttrain_workloads.runtime import RankFailure
from tests.support.processes import wait_for

MARKER = ".posttrain-complete.json"


def build_keeper(
    storage: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    keep_last: int = 2,
    strategy: str = "DDP",
    marked: list[int] | None = None,
) -> CheckpointKeeper:
    return CheckpointKeeper(
        storage,
        rank=rank,
        world_size=world_size,
        strategy=strategy,
        config_hash="sha256:0",
        keep_last=keep_last,
        on_marked=lambda _, marker: marked.append(marker.step) if marked is not None else None,
    )


def write_checkpoint(storage: Path, step: int, *, ranks: int = 1) -> Path:
    folder = storage / f"checkpoint-{step}"
    (folder / f"global_step{step}").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(f"weights {step}".encode() * 1000)
    (folder / "trainer_state.json").write_text("{}")
    for rank in range(ranks):
        (folder / f"rng_state_{rank}.pth").write_bytes(f"rng {rank}".encode())
        (folder / f"global_step{step}" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(b"o" * 99)
    return folder


def save(storage: Path, step: int, *, keep_last: int = 2, strategy: str = "DDP", ranks: int = 1) -> Path:
    """Write a checkpoint and finalise it on every rank."""
    folder = write_checkpoint(storage, step, ranks=ranks)
    keepers = [
        build_keeper(storage, rank=rank, world_size=ranks, keep_last=keep_last, strategy=strategy)
        for rank in range(ranks)
    ]
    for keeper in keepers:
        keeper.finalise(step)
    for keeper in keepers:
        keeper.wait()
    return folder


def find(storage: Path, *, world_size: int = 1, strategy: str = "DDP") -> Found:
    return newest_verified(storage, world_size=world_size, strategy=strategy)


def steps(storage: Path) -> list[int]:
    return sorted(int(folder.name.rpartition("-")[2]) for folder in storage.glob("checkpoint-*"))


def test_the_marker_names_every_file_of_every_rank(tmp_path: Path) -> None:
    folder = save(tmp_path, 10, ranks=2)
    marker = verify_folder(folder)
    assert isinstance(marker, Marker)
    assert [file.path for file in marker.files] == [
        "global_step10/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "global_step10/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "model.safetensors",
        "rng_state_0.pth",
        "rng_state_1.pth",
        "trainer_state.json",
    ]
    assert (marker.step, marker.world_size, marker.strategy) == (10, 2, "DDP")
    assert sorted(list_files(folder)) == [file.path for file in marker.files]
    assert [path.name for path in folder.glob(".*")] == [MARKER]


def test_what_another_rank_is_writing_over_its_own_files_is_none_of_the_checkpoint(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 10, ranks=2)
    files = list_files(folder)
    for name in (".rank-1.json", MARKER):
        (folder / f"{name}.new").write_bytes(b"half of it")
    first, second = (build_keeper(tmp_path, rank=rank, world_size=2) for rank in range(2))
    first.finalise(10)
    second.finalise(10)
    second.wait()
    first.wait()

    marker = verify_folder(folder)
    assert isinstance(marker, Marker)
    assert [file.path for file in marker.files] == files
    assert [path.name for path in folder.glob(".*")] == [MARKER]


@pytest.mark.parametrize(
    ("path", "rank"),
    [
        ("model.safetensors", 0),
        ("model-00003-of-00007.safetensors", 0),
        ("rng_state.pth", 0),
        ("rng_state_3.pth", 3),
        ("logging_state_2.json", 2),
        ("global_step8/zero_pp_rank_5_mp_rank_00_model_states.pt", 5),
        ("global_step8/bf16_zero_pp_rank_6_mp_rank_00_optim_states.pt", 6),
        ("global_step8/mp_rank_00_model_states.pt", 0),
        ("pytorch_model_fsdp_0/__4_0.distcp", 4),
        ("rng_state_12.pth", 0),  # of no rank of this gang
    ],
)
def test_a_file_belongs_to_the_rank_in_its_name(path: str, rank: int) -> None:
    assert owner_of(path, world_size=8) == rank


def test_nothing_counts_before_the_last_rank_is_done(tmp_path: Path) -> None:
    marked: list[int] = []
    folder = write_checkpoint(tmp_path, 4, ranks=2)
    first = build_keeper(tmp_path, rank=0, world_size=2, marked=marked)
    second = build_keeper(tmp_path, rank=1, world_size=2)
    first.finalise(4)
    wait_for((folder / ".rank-0.json").exists, what="rank 0's part of the manifest")
    assert not (folder / MARKER).exists()
    assert marked == []
    second.finalise(4)
    first.wait()
    assert marked == [4]
    assert find(tmp_path, world_size=2).step == 4


def test_older_checkpoints_go_only_after_the_newer_one_counts(tmp_path: Path) -> None:
    save(tmp_path, 2)
    save(tmp_path, 4)
    write_checkpoint(tmp_path, 6)
    assert steps(tmp_path) == [2, 4, 6]
    keeper = build_keeper(tmp_path, keep_last=1)
    keeper.finalise(6)
    keeper.wait()
    assert steps(tmp_path) == [6]


def test_a_kill_between_save_and_marker_leaves_the_previous_one(tmp_path: Path) -> None:
    save(tmp_path, 2, keep_last=1)
    write_checkpoint(tmp_path, 4)  # and nothing more: the rank is gone
    found = find(tmp_path)
    assert (found.path, found.step) == (tmp_path / "checkpoint-2", 2)
    assert [(skipped.step, skipped.reason) for skipped in found.skipped] == [
        (4, "it has no marker: its writing was interrupted")
    ]
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "has 5 bytes and was written with 9000"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 9000), "its sha256 differs"),
        (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda folder: (folder / MARKER).write_text("{"), "its marker cannot be read"),
        (
            lambda folder: (folder / MARKER).write_text(
                json.dumps({**json.loads((folder / MARKER).read_text()), "files": []})
            ),
            "its marker contradicts itself",
        ),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_kept_aside(tmp_path: Path, damage, problem: str) -> None:
    save(tmp_path, 2)
    damage(save(tmp_path, 4))
    found = find(tmp_path)
    assert found.step == 2
    assert [skipped.step for skipped in found.skipped] == [4]
    assert problem in found.skipped[0].reason
    assert steps(tmp_path) == [2]
    assert (tmp_path / "corrupt-checkpoint-4").is_dir()
    assert find(tmp_path).skipped == ()


def test_with_every_checkpoint_damaged_nothing_starts_anew_in_silence(tmp_path: Path) -> None:
    (save(tmp_path, 2) / "model.safetensors").write_bytes(b"")
    with pytest.raises(RankFailure, match=r"checkpoint-2: model.safetensors has 0 bytes") as caught:
        find(tmp_path)
    assert (caught.value.reason, caught.value.exit_code) == ("CheckpointCorrupt", 2)
    assert steps(tmp_path) == [2]


def test_an_empty_storage_starts_from_the_beginning(tmp_path: Path) -> None:
    assert find(tmp_path) == Found(path=None, step=0, skipped=())


@pytest.mark.parametrize("strategy", ["ZeRO1", "ZeRO2", "ZeRO3", "FSDP"])
def test_shards_are_not_resumed_by_another_number_of_ranks(tmp_path: Path, strategy: str) -> None:
    save(tmp_path, 2, ranks=2, strategy=strategy)
    assert find(tmp_path, world_size=2, strategy=strategy).step == 2
    with pytest.raises(RankFailure, match=r"written by 2 ranks") as caught:
        find(tmp_path, world_size=1, strategy=strategy)
    assert (caught.value.reason, caught.value.exit_code) == ("CheckpointUnusable", 2)
    assert "2 ranks" in caught.value.advice


def test_replicas_are_resumed_by_another_number_of_ranks(tmp_path: Path) -> None:
    save(tmp_path, 2, ranks=2)
    assert find(tmp_path, world_size=1).step == 2


def test_another_strategy_cannot_resume(tmp_path: Path) -> None:
    save(tmp_path, 2, ranks=2, strategy="ZeRO2")
    with pytest.raises(RankFailure, match="written with ZeRO2 and cannot be resumed with ZeRO3"):
        find(tmp_path, world_size=2, strategy="ZeRO3")


def test_what_fails_in_the_background_is_raised_in_the_training_thread(tmp_path: Path) -> None:
    keeper = build_keeper(tmp_path)
    write_checkpoint(tmp_path, 2)
    (tmp_path / "checkpoint-2" / f"{MARKER}.new").mkdir()  # where the marker is first written
    keeper.finalise(2)
    with pytest.raises(IsADirectoryError):
        keeper.wait()
    with pytest.raises(OSError) as caught:
        keeper.check()
    assert caught.value.errno == errno.EISDIR


def test_hashing_does_not_hold_up_the_step(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 2)
    with (folder / "optimizer.pt").open("wb") as file:
        file.truncate(2 * 1024**3)  # sparse: seconds to hash, nothing to write
    keeper = build_keeper(tmp_path)
    keeper.finalise(2)
    assert not (folder / MARKER).exists()
    assert any(thread.name == "checkpoint-2" for thread in threading.enumerate())
    keeper.wait()
    assert find(tmp_path).step == 2


def test_half_a_removal_counts_as_none(tmp_path: Path) -> None:
    """The marker goes first, so a kill in mid-removal leaves no folder that looks damaged."""
    folder = save(tmp_path, 2)
    save(tmp_path, 4)
    (folder / MARKER).unlink()
    found = find(tmp_path)
    assert found.step == 4
    assert [skipped.step for skipped in found.skipped] == [2]
