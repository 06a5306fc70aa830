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


def test_a_run_whose_server_is_killed_waits_for_it_and_finishes(command: Command) -> None:
    args = command.spec["grpo"]["args"]
    command.spec |= {
        "grpo": {
            **command.spec["grpo"],
            "rollout": {"mode": "Server", "server": SERVERS},
            "args": {key: value for key, value in args.items() if key != "vllm_max_model_length"} | {"max_steps": 4},
        },
        "resources": {"gpusPerNode": 0},
        "prepare": {"enabled": False},
    }
    command.start()
    command.wait_for_checkpoint(2)
    killed = command.processes(pod="tiny-server-1")
    for process in killed:
        os.kill(process, signal.SIGKILL)
    code, output = command.wait()
    assert killed
    assert code == 0, output + command.logs()

    status = command.status().status
    assert status.stage == "Succeeded"
    if status.attempt != 1:  # it died in the middle of a hand-over
        assert status.attempt == 2
        assert status.failure is not None and status.failure.reason == "ServerLost"
    history = json.loads((command.run_folder.storage / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    assert max(entry["sampling/sampling_logp_difference/mean"] for entry in steps) < 1e-4
    assert len({version for step in (1, 2, 3, 4) for version in samples(command, step, rows=4)}) == 4


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
