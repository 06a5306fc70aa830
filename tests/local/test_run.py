"""`posttrain run` as a person types it, with a workload that counts instead of training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain.api.loader import dump_document
from posttrain.api.training_run import TrainingRun
from posttrain.local.environments import COMPLETE_MARKER, find_lock, images_root
from posttrain.local.shim import ORPHAN_GRACE_SECONDS, descendants
from posttrain.local.state import RunFolder
from tests.support.builders import build_spec
from tests.support.processes import await_gone, wait_for

FAKES = Path(__file__).parents[1] / "support" / "fake_workloads"
CLI = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); from posttrain.cli import main; main()"
"""As from a terminal, also where the tests run under `nohup`, which lets their children ignore a hangup."""


class Place:
    """A folder with a resource file, inputs, a cache and a state, and the command in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_folder = RunFolder(folder / "state" / "demo")
        (folder / "inputs" / "model").mkdir(parents=True)
        (folder / "inputs" / "train.jsonl").touch()
        self.environ = {
            **os.environ,
            # Before the real posttrain_workloads, wherever that is installed.
            "PYTHONPATH": str(FAKES),
            "POSTTRAIN_STATE": str(folder / "state"),
            "POSTTRAIN_CACHE": str(folder / "cache"),
        }
        self._make_environment()

    def _make_environment(self) -> None:
        """Put this test's own interpreter where the trainer's would be."""
        folder = find_lock("trainer", images=images_root(), nvidia=False).folder(self.folder / "cache")
        interpreter = folder / "bin" / "python"
        interpreter.parent.mkdir(parents=True)
        interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        interpreter.chmod(0o755)
        (folder / COMPLETE_MARKER).touch()

    def write(self, *, fake: str = "", **changes: Any) -> None:
        """Write the resource, its spec changed so."""
        spec = {
            "model": {"source": "file://inputs/model"},
            "datasets": [{"source": "file://inputs/train.jsonl"}],
            **({"podOverrides": {"env": [{"name": "FAKE", "value": fake}]}} if fake else {}),
            **changes,
        }
        run = {
            "apiVersion": "posttrain.dev/v1alpha1",
            "kind": "TrainingRun",
            "metadata": {"name": "demo"},
            "spec": build_spec(**spec),
        }
        (self.folder / "run.yaml").write_text(dump_document(run))

    def start(self, *options: str) -> subprocess.Popen[str]:
        """Start `posttrain run`."""
        return subprocess.Popen(
            [sys.executable, "-c", CLI, "run", "run.yaml", "--plain", *options],
            cwd=self.folder,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *options: str) -> tuple[int, str]:
        """Run `posttrain run` to its end; return exit code and output."""
        process = self.start(*options)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    @property
    def resource(self) -> TrainingRun:
        """The resource as it is stored."""
        run = self.run_folder.read_run()
        assert run is not None
        return run

    def await_step(self, step: int) -> None:
        """Wait until the run has reached a step."""
        wait_for(lambda: self._step() >= step, what=f"step {step}")

    def _step(self) -> int:
        run = self.run_folder.read_run()
        return (run.status.progress.step or 0) if run and run.status.progress else 0

    def steps(self, pod: str) -> list[int]:
        """Return the steps that a pod did."""
        return [int(line.removeprefix("step ")) for line in self.run_folder.log_file(pod).read_text().splitlines()]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_run_is_prepared_trained_and_ends_with_exit_code_0(place: Place) -> None:
    place.write()

    code, output = place.run()

    status = place.resource.status
    assert (code, status.stage, status.attempt) == (0, "Succeeded", 1), output
    assert status.progress is not None
    assert (status.progress.step, status.progress.max_steps, status.progress.percentage) == (20, 20, 100)
    assert status.model is not None
    assert status.model.uri == "pvc://demo/demo/model"
    assert place.steps("demo-a1-master-0") == list(range(1, 21))
    assert place.run_folder.storage.resolve() == place.run_folder.volumes / "demo" / "demo"


def test_a_finished_run_says_so_and_trains_nothing(place: Place) -> None:
    place.write()
    place.run()
    before = place.resource

    code, output = place.run()

    assert code == 0
    assert "has ended before, and nothing was trained now" in output
    assert f"remove {place.run_folder.path}" in output
    assert place.resource == before


def test_ctrl_c_stops_after_a_checkpoint_and_the_command_that_is_printed_resumes(place: Place) -> None:
    place.write(fake="slow")
    process = place.start("--set", "spec.sft.args.max_steps=12")
    place.await_step(5)

    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)

    stopped = place.resource
    assert process.returncode == 130, output
    assert (stopped.status.stage, stopped.spec.suspend) == ("Suspended", True)
    assert "posttrain run run.yaml --set spec.sft.args.max_steps=12" in output.splitlines()[-1]
    code, output = place.run("--set", "spec.sft.args.max_steps=12")
    resumed = place.resource
    assert (code, resumed.status.stage, resumed.spec.suspend) == (0, "Succeeded", False), output
    done = place.steps("demo-a1-master-0") + place.steps("demo-a2-master-0")
    assert done == list(range(1, 13))
    assert resumed.status.restarts is not None
    assert (resumed.status.restarts.infrastructure, resumed.status.restarts.steps_lost) == (0, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_kill_and_a_closed_terminal_stop_it_the_same_way(place: Place, number: signal.Signals) -> None:
    place.write(fake="slow")
    process = place.start()
    place.await_step(4)

    process.send_signal(number)
    process.communicate(timeout=60)

    assert (process.returncode, place.resource.status.stage) == (130, "Suspended")


def test_a_run_goes_on_to_its_checkpoint_when_its_terminal_is_gone(place: Place) -> None:
    place.write(fake="slow")
    process = place.start()
    place.await_step(4)
    assert process.stdout is not None
    process.stdout.close()

    process.send_signal(signal.SIGHUP)
    process.wait(timeout=60)

    assert place.resource.status.stage == "Suspended"
    assert place.resource.status.checkpoints is not None


def test_a_second_ctrl_c_ends_everything_at_once(place: Place) -> None:
    place.write(fake="deaf")
    process = place.start()
    place.await_step(4)
    below = descendants(process.pid)

    process.send_signal(signal.SIGINT)
    wait_for(lambda: place.resource.spec.suspend, what="the suspension")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)

    assert process.returncode == 130, output
    await_gone(below, seconds=0.1)
    code, output = place.run("--set", "spec.restarts.maxInfrastructureRestarts=0")
    assert (code, place.resource.status.stage) == (0, "Succeeded"), output


def test_after_a_kill_nothing_is_left_and_the_same_command_resumes(place: Place) -> None:
    place.write(fake="slow")
    process = place.start()
    place.await_step(5)
    below = descendants(process.pid)

    process.kill()
    process.communicate()
    await_gone(below, seconds=ORPHAN_GRACE_SECONDS + 5)
    code, output = place.run()

    status = place.resource.status
    assert (code, status.stage) == (0, "Succeeded"), output
    assert status.restarts is not None
    assert status.restarts.infrastructure == 1
    assert min(place.steps("demo-a2-master-0")) >= 5


def test_the_same_command_right_after_a_kill_ends_what_is_left_itself(place: Place) -> None:
    place.write(fake="deaf")
    process = place.start()
    place.await_step(5)
    below = descendants(process.pid)

    process.kill()
    process.communicate()
    again = place.start()
    await_gone(below, seconds=ORPHAN_GRACE_SECONDS - 1)

    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0, output


def test_a_second_execution_is_refused_with_the_first_ones_process(place: Place) -> None:
    place.write(fake="slow")
    first = place.start()
    place.await_step(1)

    code, output = place.run()
    first.kill()
    first.communicate()

    assert code == 2
    assert f"already being executed by process {first.pid} since 20" in output


def test_another_spec_under_the_same_name_is_refused_once_something_was_trained(place: Place) -> None:
    place.write()
    place.run()
    before = place.resource

    code, output = place.run("--set", "spec.sft.args.learning_rate=1e-4")

    assert code == 2
    assert "spec.sft.args.learning_rate differ" in output
    assert place.resource == before


def test_what_prepare_finds_wrong_ends_in_exit_code_2_and_can_be_mended_under_the_same_name(place: Place) -> None:
    place.write(systemPrompt="wrong")

    code, output = place.run()
    assert (code, place.resource.status.stage) == (2, "Failed"), output
    assert "the prompt is wrong: mend it" in output
    assert place.resource.status.attempt in {None, 0}

    place.write(systemPrompt="right")
    code, output = place.run()
    assert (code, place.resource.status.stage) == (0, "Succeeded"), output


def test_a_dry_run_can_be_followed_by_the_run(place: Place) -> None:
    place.write()

    dry = place.run("--set", "spec.prepare.dryRun=true")
    assert (dry[0], place.resource.status.stage, place.resource.status.attempt) == (0, "Succeeded", None)
    code, output = place.run()

    assert (code, place.resource.status.attempt) == (0, 1), output


def test_a_failed_run_ends_in_exit_code_1_now_and_when_it_is_asked_for_again(place: Place) -> None:
    place.write(fake="fail")

    first, again = place.run(), place.run()

    assert (first[0], again[0], place.resource.status.stage) == (1, 1, "Failed")
    assert "the loss is blue" in first[1]


def test_a_killed_process_restarts_the_gang_from_its_checkpoint(place: Place) -> None:
    place.write(fake="die")

    code, output = place.run()

    status = place.resource.status
    assert (code, status.stage, status.attempt) == (0, "Succeeded", 2), output
    assert place.steps("demo-a2-master-0") == list(range(3, 21))
    assert status.restarts is not None
    assert (status.restarts.infrastructure, status.restarts.steps_lost) == (1, 1)


def test_two_nodes_are_two_pods(place: Place) -> None:
    place.write(resources={"gpusPerNode": 0, "numNodes": 2, "cpu": "1"})

    code, output = place.run()

    assert code == 0, output
    assert place.run_folder.log_file("demo-a1-worker-0").exists()


def test_a_resource_with_problems_leaves_nothing_behind(place: Place) -> None:
    place.write(resources={"gpusPerNode": 3}, datasets=[{"source": "file://nowhere"}])

    code, output = place.run()

    assert (code, len(output.splitlines())) == (2, 2), output
    assert not (place.folder / "state").exists()


def test_a_second_run_of_the_file_starts_from_the_model_of_the_first(place: Place) -> None:
    place.write()
    first = (place.folder / "run.yaml").read_text()
    second = first.replace("name: demo", "name: next").replace("source: file://inputs/model", "runRef: {name: demo}")
    assert second.count("runRef") == 1
    (place.folder / "run.yaml").write_text(f"{second}---\n{first}")

    code, output = place.run()

    assert code == 0, output
    folder = RunFolder(place.folder / "state" / "next")
    run = folder.read_run()
    assert run is not None
    assert run.status.stage == "Succeeded"
    assert run.status.provenance is not None
    assert run.status.provenance.model_source == "pvc://demo/demo/model"
    assert place.resource.status.completion_time <= run.status.start_time
    code, output = place.run()
    assert (code, output.count("has ended before")) == (0, 2)


def test_what_follows_a_run_that_failed_is_not_begun(place: Place) -> None:
    place.write(fake="fail", restarts={"maxApplicationRestarts": 0, "maxInfrastructureRestarts": 0})
    first = (place.folder / "run.yaml").read_text()
    second = first.replace("name: demo", "name: next").replace("source: file://inputs/model", "runRef: {name: demo}")
    (place.folder / "run.yaml").write_text(f"{first}---\n{second}")

    code, output = place.run()

    assert code == 1, output
    assert "Not begun, because of demo: next." in output
    assert not (place.folder / "state" / "next").exists()


RECORDED = """
import os, sys
from contextlib import nullcontext
from pathlib import Path
from posttrain.local.runner import run_file

folder, state = Path(sys.argv[1]), Path(sys.argv[2])
opened = []

def note(event, arguments):
    if event in {"open", "os.listdir", "os.scandir"} and isinstance(arguments[0], str | bytes | os.PathLike):
        opened.append(os.fspath(arguments[0]))

class View:
    def __getattr__(self, name):
        return lambda *arguments: None

sys.addaudithook(note)
code = run_file(
    folder / "run.yaml",
    sets=[],
    claims={},
    secrets={},
    state_root=state,
    cache=folder / "cache",
    open_view=lambda: nullcontext(View()),
)
storage = state / "demo" / "volumes" / "demo"
assert (storage / "demo" / "step").exists()
print([str(path) for path in opened if Path(os.fsdecode(path)).is_relative_to(storage) or "storage" in str(path)])
sys.exit(code)
"""


def test_status_is_made_without_a_look_into_the_storage(place: Place) -> None:
    place.write()

    ended = subprocess.run(
        [sys.executable, "-c", RECORDED, place.folder, place.folder / "state"],
        env=place.environ,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr
    assert place.resource.status.checkpoints is not None
    assert place.resource.status.checkpoints.latest_step == 20


def test_a_token_is_in_no_object_and_no_log(place: Place) -> None:
    (place.folder / "keys").mkdir()
    (place.folder / "keys" / "WANDB_API_KEY").write_text("a-secret-key")
    place.write(tracking={"secretRef": "keys"})

    code, output = place.run("--secret", f"keys={place.folder / 'keys'}")

    files = [*place.run_folder.objects.iterdir(), *place.run_folder.logs.iterdir(), place.run_folder.resource_file]
    assert code == 0, output
    assert not any("a-secret-key" in file.read_text() for file in files)
    assert json.loads(place.run_folder.resource_file.read_text())["kind"] == "TrainingRun"
