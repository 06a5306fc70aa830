"""`posttrain run` with completions from a real vLLM, on CPUs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workloads._command import POSTTRAIN, Command
from tests.workloads._configs import GRPO_ARGS

pytestmark = [pytest.mark.workloads, pytest.mark.rollouts, pytest.mark.timeout(1200)]

OWN_CODE = Path(__file__).with_name("own_code")
WAIT_SECONDS = 900.0
SERVERS = {"replicas": 2, "gpusPerNode": 0, "cpu": "1", "maxModelLength": 256}


@pytest.fixture
def command(tmp_path: Path, vllm_python: Path, tiny_model: Path) -> Iterator[Command]:
    """A run of two ranks with an engine in each, whose rewards differ, so that every step changes the weights."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"problem": f"How much is {n} + 1?"}) + "\n" for n in range(8)))
    made = Command(
        folder=tmp_path / "work",
        wait_seconds=WAIT_SECONDS,
        spec={
            "model": {"source": f"file://{tiny_model}", "dtype": "float32"},
            "datasets": [{"source": f"file://{problems}"}],
            "promptColumn": "problem",
            "code": {"path": str(OWN_CODE)},
            "grpo": {
                "rollout": {"mode": "Colocate"},
                "rewards": [{"function": "own_rewards:varied"}],
                "args": {**GRPO_ARGS, "max_steps": 3, "learning_rate": 1e-2, "vllm_max_model_length": 256},
            },
            "resources": {"gpusPerNode": 0, "processesPerNode": 2},
            "checkpoints": {"everySteps": 2},
        },
    )
    yield made
    made.end()


def test_a_run_with_vllm_inside_its_ranks_samples_each_step_with_the_weights_of_that_step(command: Command) -> None:
    code, output = command.start().wait()
    assert code == 0, output + command.logs()

    status = command.status().status
    assert status.stage == "Succeeded"
    assert status.provenance is not None and status.provenance.versions is not None
    assert status.provenance.versions["vllm"] == "0.31.0+cpu"
    history = json.loads((command.run_folder.storage / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert len({entry["grad_norm"] for entry in steps} - {0.0}) == 3
    differences = [entry["sampling/sampling_logp_difference/mean"] for entry in steps]
    assert max(differences) < 1e-4
    assert [samples(command, step) for step in (1, 2, 3)] == [{"step-0"}, {"step-1"}, {"step-2"}]


def test_a_run_whose_server_is_killed_finishes_also_where_that_is_inside_a_hand_over(
    command: Command, tmp_path: Path
) -> None:
    halts, rollouts = tmp_path / "halts", tmp_path / "rollouts"
    halts.mkdir()
    args = {key: value for key, value in command.spec["grpo"]["args"].items() if key != "vllm_max_model_length"}
    command.spec |= {
        "grpo": {
            "rollout": {"mode": "Server", "server": SERVERS},
            "rewards": [{"function": "own_rewards:record", "params": {"file": str(rollouts)}}],
            "args": {**args, "max_steps": 4},
        },
        "callbacks": [
            {"function": "faults:Halt", "params": {"folder": str(halts), "between": 2, "inside": 3}},
        ],
        "resources": {"gpusPerNode": 0},
        "prepare": {"enabled": False},
    }
    command.start()
    command.wait_for((halts / "between").exists, what="the end of step 2")
    kill(command.processes(pod="tiny-server-1"))
    (halts / "between-over").touch()
    command.wait_for((halts / "inside").exists, what="the hand-over before step 4")
    kill(command.processes(pod="tiny-server-1"))
    (halts / "inside-over").touch()
    code, output = command.wait()
    assert code == 0, output + command.logs()

    status = command.status().status
    assert (status.stage, status.attempt) == ("Succeeded", 2)
    assert status.failure is not None
    assert (status.failure.reason, status.failure.exit_code) == ("ServerLost", 138)
    assert "(POST /update_weights)" in status.failure.message
    # The first death cost nothing, the second one step 3.
    assert [json.loads(line)[0] for line in rollouts.read_text().splitlines()] == [0, 1, 2, 2, 3]
    assert status.restarts is not None
    assert (status.restarts.infrastructure, status.restarts.steps_lost) == (1, 1)
    history = json.loads((command.run_folder.storage / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    assert max(entry["sampling/sampling_logp_difference/mean"] for entry in steps) < 1e-4
    assert len({version for step in range(1, 5) for version in samples(command, step, rows=4)}) == 4


def kill(processes: list[int]) -> None:
    assert processes
    for process in processes:
        os.kill(process, signal.SIGKILL)


def samples(command: Command, step: int, *, rows: int = 8) -> set[str]:
    """Return the versions of the weights that the completions of a step are shown with."""
    done = subprocess.run(
        [POSTTRAIN, "samples", "tiny", "--step", str(step)],
        cwd=command.folder,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if "; weights " in line]
    assert len(lines) == rows
    return {line.rpartition("; weights ")[2].removesuffix("]") for line in lines}
