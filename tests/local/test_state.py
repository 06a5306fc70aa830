"""The folder of a run: one process at a time, one spec, and files that are never half written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.api.training_run import TrainingRunStatus
from posttrain.errors import UserError
from posttrain.local.state import (
    RunFolder,
    find_spec_changes,
    list_runs,
    lock_holder,
    locked,
    refuse_changed_spec,
    state_root,
    write_atomically,
)
from posttrain.local.store import RunStore, accept_run
from tests.support.builders import T0, at, build_run

HOLD = """
import sys
from pathlib import Path
from posttrain.local.state import RunFolder, locked
with locked(RunFolder(Path(sys.argv[1])), command="posttrain run demo.yaml"):
    print("locked", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Let another process take the lock."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_second_execution_is_refused_and_the_first_one_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "demo")
    with hold(folder.path) as first:
        with pytest.raises(UserError) as refused, locked(folder, command="posttrain run other.yaml"):
            pass
        holder = lock_holder(folder)
        first.kill()

    assert f"process {first.pid} since 20" in str(refused.value)
    assert "(posttrain run demo.yaml)" in str(refused.value)
    assert holder is not None
    assert holder.pid == first.pid


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "demo")
    with hold(folder.path) as first:
        first.kill()
        first.wait()

    with locked(folder, command="posttrain run demo.yaml"):
        holder = lock_holder(folder)

    assert holder is not None
    assert holder.pid == os.getpid()
    assert lock_holder(folder) is None


def test_a_folder_that_nobody_has_written_to_has_no_holder_and_no_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "demo")

    assert (lock_holder(folder), folder.read_run(), list_runs(tmp_path)) == (None, None, [])


def test_the_resource_is_read_back_as_it_was_stored(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "demo")
    folder.path.mkdir()
    run = accept_run(build_run(sft={"args": {"learning_rate": 1e-4, "run_name": None}}), stored=None, now=T0)

    store = RunStore(folder, run)
    store.write_status(TrainingRunStatus(stage="Training", start_time=at(3)))

    assert folder.read_run() == store.run
    assert store.run.status.start_time == at(3)
    assert [found.name for found in list_runs(tmp_path)] == ["demo"]


def test_a_resource_of_another_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "demo")
    folder.path.mkdir()
    folder.resource_file.write_text('{"kind": "TrainingRun"}')

    with pytest.raises(UserError, match=r"another version of posttrain wrote it. Remove .*demo to start anew"):
        folder.read_run()


def test_the_fields_in_which_two_specs_differ_are_named() -> None:
    old = build_run(sft={"args": {"max_steps": 20, "learning_rate": 1e-4}})
    new = build_run(sft={"args": {"max_steps": 30, "packing": True}}, testFraction="0.1")

    changes = find_spec_changes(old.spec, new.spec)

    assert changes == [
        "spec.sft.args.learning_rate",
        "spec.sft.args.max_steps",
        "spec.sft.args.packing",
        "spec.testFraction",
    ]
    assert "spec.sft.args.max_steps, " in str(refuse_changed_spec(RunFolder(Path("/s/demo")), changes=changes))


def test_fields_that_may_change_while_a_run_lives_are_no_difference() -> None:
    changed = build_run(suspend=True, restarts={"maxInfrastructureRestarts": 3})

    assert find_spec_changes(build_run().spec, changed.spec) == []


def test_on_one_machine_the_shape_is_fixed_and_the_queue_means_nothing() -> None:
    resources = {"gpusPerNode": 0}
    old = build_run(resources=resources).spec

    assert find_spec_changes(old, build_run(resources={**resources, "queueName": "team-a"}).spec) == []
    reshaped = build_run(resources={**resources, "numNodes": 2, "profile": "h100"}).spec
    assert find_spec_changes(old, reshaped) == ["spec.resources.numNodes", "spec.resources.profile"]


def test_a_run_keeps_its_identity_and_status_when_its_file_is_applied_again() -> None:
    first = accept_run(build_run(), stored=None, now=T0)
    stored = first.model_copy(update={"status": TrainingRunStatus(stage="Training")})

    same = accept_run(build_run(), stored=stored, now=at(60))
    changed = accept_run(build_run(suspend=True), stored=stored, now=at(60))

    assert same == stored
    assert changed.metadata == stored.metadata.model_copy(update={"generation": 2})
    assert (changed.spec.suspend, changed.status.stage) == (True, "Training")


def test_running_a_suspended_run_again_touches_it() -> None:
    first = accept_run(build_run(), stored=None, now=T0)
    held = first.model_copy(update={"status": TrainingRunStatus(stage="Suspended")})

    assert accept_run(build_run(), stored=held, now=at(60)).metadata.generation == 2


def test_clearing_a_folder_keeps_its_lock_and_what_its_links_point_to(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "demo")
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "model").touch()
    with locked(folder, command="x"):
        folder.storage.symlink_to(kept)
        (folder.volumes / "demo").mkdir(parents=True)
        folder.clear()

        assert list(folder.path.iterdir()) == [folder.lock_file]
        assert (kept / "model").exists()


def test_a_replaced_file_leaves_no_other_behind(tmp_path: Path) -> None:
    file = tmp_path / "resource.json"

    write_atomically(file, "old")
    write_atomically(file, "new", durable=False)

    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("resource.json", "new")]


def test_the_state_is_where_the_environment_says(tmp_path: Path) -> None:
    assert state_root({"POSTTRAIN_STATE": str(tmp_path)}) == tmp_path
    assert state_root({}) == Path.cwd() / ".posttrain"
