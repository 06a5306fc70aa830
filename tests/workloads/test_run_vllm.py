"""`posttrain run` with completions from a real vLLM, on CPUs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.workloads._command import POSTTRAIN, Command
from tests.workloads._configs import GRPO_ARGS
from tests.workloads._rollout import add_dropping_plugin

pytestmark = [pytest.mark.workloads, pytest.mark.rollouts, pytest.mark.timeout(1200)]

OWN_CODE = Path(__file__).with_name("own_code")
TURNS = Path(__file__).parents[2] / "examples" / "quickstart" / "own" / "turns.py"
WAIT_SECONDS = 900.0
CALL = r'<tool_call>\n\{"name": "guess", "arguments": \{"number": [78]\}\}\n</tool_call>'
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
                "trainerClass": "hand_overs:ComparingTrainer",
                "rewards": [{"function": "own_rewards:varied"}],
                "args": {**GRPO_ARGS, "max_steps": 3, "learning_rate": 1e-2, "vllm_max_model_length": 256},
            },
            "resources": {"gpusPerNode": 0, "processesPerNode": 2},
            "checkpoints": {"everySteps": 2},
            "podOverrides": {"env": [{"name": "VLLM_CPU_KVCACHE_SPACE", "value": "1"}]},
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
    claim = command.folder / "claim"  # as a run in a cluster leaves it there
    shutil.copytree(command.run_folder.storage / "completions", claim / "tiny" / "completions")
    assert samples(command, 3, "--claim", "claim", "--state", "nowhere") == {"step-2"}
    for rank in (0, 1):
        assert [(seen["step"], seen["equal"]) for seen in rollouts(command, rank=rank)] == [
            (step, [True]) for step in (0, 1, 2)
        ]


def test_two_ranks_with_two_servers_finish_though_one_is_killed_between_hand_overs_and_inside_one(
    command: Command, tmp_path: Path
) -> None:
    """The trainer's rank 0 alone speaks with the servers, and the other one waits for it."""
    halts, rewarded = tmp_path / "halts", tmp_path / "rewarded"
    halts.mkdir()
    args = {key: value for key, value in command.spec["grpo"]["args"].items() if key != "vllm_max_model_length"}
    command.spec |= {
        "grpo": {
            "rollout": {"mode": "Server", "server": SERVERS},
            "trainerClass": "hand_overs:ComparingTrainer",
            "rewards": [{"function": "own_rewards:record", "params": {"file": str(rewarded)}}],
            "args": {**args, "max_steps": 4},
        },
        "callbacks": [
            {"function": "faults:Halt", "params": {"folder": str(halts), "between": 2, "inside": 3}},
        ],
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
    first, others = rollouts(command, rank=0), rollouts(command, rank=1)
    assert [seen["step"] for seen in first] == [seen["step"] for seen in others] == [0, 1, 2, 2, 3]
    assert [seen["equal"] for seen in first] == [[True, True]] * 5
    assert [seen["client"] for seen in others] == [False] * 5
    prompts = [json.loads(line) for line in rewarded.read_text().splitlines()]
    assert sorted(rows for step, rows in prompts[4:6]) == sorted(rows for step, rows in prompts[6:8])
    assert status.restarts is not None
    assert (status.restarts.infrastructure, status.restarts.steps_lost) == (1, 1)
    history = json.loads((command.run_folder.storage / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    assert max(entry["sampling/sampling_logp_difference/mean"] for entry in steps) < 1e-4
    # Each step's prompts went to both servers, and its completions are from the version that both have.
    one, two = dict.fromkeys(first[0]["servers"])
    for seen in first:
        assert seen["servers"] == [server for server in (one, two) * 2 for _ in range(2)]
        assert len({*seen["weights"], *seen["has"]}) == 1
    versions = {seen["step"]: set(seen["weights"]) for seen in first}
    assert [samples(command, step) for step in range(1, 5)] == [versions[step] for step in range(4)]
    assert len(set().union(*versions.values())) == 4


def test_a_run_ends_when_one_of_two_servers_dropped_an_update_also_with_a_rollout_function(
    command: Command, tmp_path: Path, quickstart_inputs: Path
) -> None:
    """Two ranks that have half of each weight hand all of it over before that."""
    halts, code = tmp_path / "halts", tmp_path / "code"
    halts.mkdir()
    (halts / "between-over").touch()  # it goes on at once, and its own file is there from the end of step 2
    shutil.copytree(OWN_CODE, code, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TURNS, code)
    add_dropping_plugin(code)
    args = {key: value for key, value in command.spec["grpo"]["args"].items() if key != "vllm_max_model_length"}
    command.spec |= {
        "datasets": [{"source": f"file://{quickstart_inputs / 'problems.jsonl'}"}],
        "code": {"path": str(code)},
        "grpo": {
            "rollout": {"mode": "Server", "server": SERVERS},
            "rolloutFunction": "turns:answer_twice",
            "rewards": [{"function": "own_rewards:varied"}],
            "args": {**args, "max_steps": 4},
        },
        "callbacks": [{"function": "faults:Halt", "params": {"folder": str(halts), "between": 2, "inside": -1}}],
        "parallelism": {"strategy": "ZeRO3"},
        "prepare": {"enabled": False},
        "podOverrides": {
            "env": [
                {"name": "VLLM_CPU_KVCACHE_SPACE", "value": "1"},
                {"name": "VLLM_PLUGINS", "value": "dropping,posttrain_plain_weights"},
                {"name": "DROP_POD", "value": "tiny-server-1"},
                {"name": "DROP_WHILE", "value": str(halts / "between")},
            ]
        },
    }
    code_, output = command.start("--plain").wait()

    status = command.status().status
    assert code_ != 0 and status.stage == "Failed", output + command.logs()
    assert status.failure is not None and status.failure.message is not None
    assert (status.failure.reason, status.failure.exit_code) == ("StaleRolloutWeights", 1), output + command.logs()
    told = re.match(
        r"attempt 1: at step 3 the log-probabilities of the completions differ from the trainer's in those of "
        r"(http://\S+) \(by ",
        status.failure.message,
    )
    assert told is not None, status.failure.message
    assert f"Starting vLLM server on {told[1]}\n" in command.run_folder.log_file("tiny-server-1").read_text()
    assert ", and not in those of the other rollout servers (1); rounding explains 0.0003: " in status.failure.message
    assert "At a later one weights were lost on the way" in output
    logged = [fact.body.metrics for fact in command.facts() if fact.body.type == "Logged"]
    steps = [{name: float(value) for name, value in metrics.items()} for metrics in logged if "loss" in metrics]
    assert len(steps) == 2
    for metrics in steps:
        assert metrics["sampling/sampling_logp_difference/worst"] < 1e-4
        assert metrics["completions/max_length"] == 2 * GRPO_ARGS["max_completion_length"]  # of two turns


def test_the_tools_of_an_environment_are_called_by_completions_from_a_server_of_two_nodes(
    command: Command, vllm_python: Path, tmp_path: Path
) -> None:
    """A grammar makes the tiny model call the tool. After two steps the server's second node dies."""
    halts = tmp_path / "halts"
    halts.mkdir()
    [templates] = vllm_python.parents[1].glob("lib/*/site-packages/trl/chat_templates")
    args = {key: value for key, value in command.spec["grpo"]["args"].items() if key != "vllm_max_model_length"}
    command.spec["model"]["chatTemplate"] = (templates / "qwen2_5.jinja").read_text()
    command.spec["resources"]["processesPerNode"] = 1
    command.spec["grpo"] = {
        "rollout": {"mode": "Server", "server": {"nodesPerReplica": 2, "cpu": "1", "maxModelLength": 512}},
        "rolloutFunction": "guessing:Guess",
        "trainerClass": "hand_overs:ComparingTrainer",
        "rewards": [{"function": "guessing:told"}],
        "args": {
            **args,
            "max_steps": 3,
            "max_completion_length": 200,
            "max_tool_calling_iterations": 1,
            "vllm_structured_outputs_regex": CALL,
        },
    }
    halt = {"function": "faults:Halt", "params": {"folder": str(halts), "between": 2, "inside": -1}}
    command.spec["callbacks"] = [halt]
    command.start()
    command.wait_for((halts / "between").exists, what="the end of step 2")
    kill(command.processes(pod="tiny-server-1"))
    (halts / "between-over").touch()
    code, output = command.wait()

    assert code == 0, output + command.logs()
    assert command.status().status.attempt == 1
    first, second = (command.run_folder.log_file(f"tiny-server-{node}").read_text() for node in range(2))
    assert "posttrain: node 0 of 2 ends: node 1 of this server ended, see its log" in first
    assert first.count("posttrain: node 1 is there, 2 of 2\n") == 2
    assert second.count("posttrain: node 1 of 2 waits for the first one at 127.0.0.1:") == 2
    logged = [fact.body.metrics for fact in command.facts() if fact.body.type == "Logged"]
    steps = [{name: float(value) for name, value in metrics.items()} for metrics in logged if "loss" in metrics]
    assert [(metrics["tools/call_frequency"], metrics["tools/failure_frequency"]) for metrics in steps] == [(1, 0)] * 3
    log = command.run_folder.log_file("tiny-a1-master-0").read_text()
    # Of what the grammar allows is not of all tokens: nothing is concluded from that.
    assert min(metrics["sampling/sampling_logp_difference/mean"] for metrics in steps) > 0.1
    assert "spec.grpo.args.vllm_structured_outputs_regex: vLLM gives log-probabilities of what is left" in log
    assert [metrics["rewards/told/mean"] for metrics in steps] == [metrics["rewards/Guess/mean"] for metrics in steps]
    assert [(seen["step"], seen["equal"]) for seen in rollouts(command, rank=0)] == [(n, [True]) for n in range(3)]


def kill(processes: list[int]) -> None:
    assert processes
    for process in processes:
        os.kill(process, signal.SIGKILL)


def rollouts(command: Command, *, rank: int) -> list[dict[str, Any]]:
    """Return what a rank saw after each of its rollouts."""
    file = command.run_folder.storage / f"rollouts-of-rank-{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def samples(command: Command, step: int, *options: str) -> set[str]:
    """Return the versions of the weights that the completions of a step are shown with."""
    done = subprocess.run(
        [POSTTRAIN, "samples", "tiny", "--step", str(step), *options],
        cwd=command.folder,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if "; weights " in line]
    assert len(lines) == 8
    return {line.rpartition("; weights ")[2].removesuffix("]") for line in lines}
