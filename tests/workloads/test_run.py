"""`posttrain run` as a person uses it: the command, a file, a tiny model, and what may happen on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import wait_for
from tests.support.sandbox import running_sandbox
from tests.workloads._command import POSTTRAIN, WAIT_SECONDS, Command
from tests.workloads._configs import ARGS, GRPO_ARGS

pytestmark = pytest.mark.workloads


@pytest.fixture
def command(tmp_path: Path, tiny_model: Path, rows: Path):
    """A run of two ranks that takes long enough to be disturbed; nothing of it is left at the end."""
    made = Command(
        folder=tmp_path / "work",
        spec={
            "model": {"source": f"file://{tiny_model}"},
            "datasets": [{"source": f"file://{rows}"}],
            "sft": {"args": {**ARGS, "max_steps": 40, "per_device_train_batch_size": 1}},
            "resources": {"gpusPerNode": 0, "processesPerNode": 2},
            "checkpoints": {"everySteps": 4},
        },
    )
    yield made
    made.end()


def test_a_killed_rank_restarts_the_gang_and_the_status_counts_what_it_cost(command: Command) -> None:
    command.start()
    command.wait_for_checkpoint(8)
    os.kill(command.processes(rank=1)[0], signal.SIGKILL)
    code, output = command.wait()
    assert code == 0, output + command.logs()

    run = command.status()
    status = run.status
    assert (status.stage, status.attempt) == ("Succeeded", 2)
    assert status.restarts is not None
    assert (status.restarts.infrastructure, status.restarts.application) == (1, 0)
    history = json.loads((command.run_folder.storage / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 41))
    facts = command.facts()
    resumed = next(f.body.resumed_from_step for f in facts if f.attempt == 2 and f.body.type == "Started")
    reached = next(f.body.last_step for f in facts if f.attempt == 1 and f.body.type == "Result")
    assert resumed >= 8
    assert status.restarts.steps_lost == reached - resumed
    assert "RankKilled" in output
    assert (command.run_folder.path / "report.html").stat().st_size > 10_000


def test_after_a_kill_of_the_command_nothing_is_left_and_the_next_one_goes_on(command: Command) -> None:
    command.start()
    command.wait_for_checkpoint(8)
    assert command.process is not None
    command.process.kill()
    command.process.communicate()
    wait_for(lambda: not command.processes(), what="the end of every process", seconds=60)

    code, output = command.start().wait()
    assert code == 0, output + command.logs()
    status = command.status().status
    assert (status.stage, status.attempt) == ("Succeeded", 2)
    assert status.restarts is not None and status.restarts.infrastructure == 1
    # What the ranks wrote while nobody listened has arrived by now.
    last = {(fact.attempt, fact.source): fact.seq for fact in command.facts()}
    assert status.progress is not None and status.progress.acknowledged is not None
    assert last == {(a.attempt, a.source): a.seq for a in status.progress.acknowledged if (a.attempt, a.source) in last}


def test_a_second_command_is_refused_and_an_interrupted_one_resumes_at_no_cost(command: Command) -> None:
    command.start()
    command.wait_for_checkpoint(4)
    assert command.process is not None
    second = subprocess.run(
        [POSTTRAIN, "run", "run.yaml"], cwd=command.folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert second.returncode == 2
    assert f"is already being executed by process {command.process.pid}" in second.stderr

    command.process.send_signal(signal.SIGINT)
    code, output = command.wait()
    assert code == 130, output + command.logs()
    assert "To resume: posttrain run run.yaml" in output
    assert not command.processes()
    suspended = command.status().status
    assert suspended.stage == "Suspended"

    code, output = command.start().wait()
    assert code == 0, output + command.logs()
    status = command.status().status
    assert (status.stage, status.attempt) == ("Succeeded", 2)
    assert status.restarts is not None
    assert (status.restarts.infrastructure or 0, status.restarts.steps_lost or 0) == (0, 0)

    code, output = command.start("--set", "spec.sft.args.learning_rate=1e-5").wait()
    assert code == 2
    assert "spec.sft.args.learning_rate" in output and "another metadata.name" in output


def test_status_needs_nothing_from_the_storage(command: Command) -> None:
    """The record arrives as facts: an executor that may not read what the ranks write knows the same."""
    command.spec["resources"] = {"gpusPerNode": 0}
    command.spec["sft"]["args"]["max_steps"] = 6
    command.write()
    script = Path(__file__).with_name("run_without_storage.py")
    done = subprocess.run(
        [sys.executable, script, "run.yaml", ".posttrain"],
        cwd=command.folder,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + command.logs()
    status = command.status().status
    assert status.stage == "Succeeded"
    assert status.checkpoints is not None and status.checkpoints.latest_step == 6
    assert status.model is not None and status.model.uri == "pvc://tiny/tiny/model"
    assert status.progress is not None and status.progress.history is not None
    trained = json.loads((command.run_folder.storage / "trainer_state.json").read_text())["log_history"]
    told = [(point.step, float(point.loss)) for point in status.progress.history if point.loss is not None]
    assert told == [(entry["step"], pytest.approx(entry["loss"])) for entry in trained if "loss" in entry]


def test_a_reward_that_tells_nothing_apart_suspends_the_run_after_a_checkpoint(command: Command, rows: Path) -> None:
    problems = [json.loads(line)["messages"][0]["content"] for line in rows.read_text().splitlines()]
    data = command.folder.with_name("problems.jsonl")
    data.write_text("".join(json.dumps({"prompt": problem}) + "\n" for problem in problems))
    del command.spec["sft"]
    command.spec |= {
        "datasets": [{"source": f"file://{data}"}],
        "code": {"path": str(Path(__file__).with_name("own_code"))},
        "grpo": {
            "rewards": [{"function": "own_rewards:constant"}],
            "args": {**GRPO_ARGS, "max_steps": 10_000},
            "signal": {"deadReward": {"policy": "Suspend", "steps": 3}},
        },
        "resources": {"gpusPerNode": 0},
        "prepare": {"enabled": False},
        "checkpoints": {"everySteps": 10_000},
    }
    code, output = command.start("--plain").wait()
    assert code != 0, output + command.logs()
    found = "frac_reward_zero_std is 1 at step 3, and was at least 0.95 for 3 logged steps in a row"
    assert f"Warning: RewardSignalDead: attempt 1: {found}: the run is suspended" in output

    status = command.status().status
    assert (status.stage, status.attempt) == ("Suspended", 2)
    assert status.checkpoints is not None and status.checkpoints.latest_step is not None
    assert status.failure is not None and "harder prompts" in (status.failure.advice or "")
    assert [fact.body.step for fact in command.facts() if fact.body.type == "SignalLost"] == [3]


def test_what_prepare_finds_wrong_ends_the_command_before_any_training(command: Command, tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n')
    command.spec["datasets"] = [{"source": f"file://{tmp_path}/odd.jsonl"}]
    code, output = command.start().wait()
    assert code == 2, output + command.logs()
    assert "question" in output and "messages" in output
    assert "Started" not in {fact.body.type for fact in command.facts()}
    assert [file.name for file in command.run_folder.logs.glob("*.log")] == ["tiny-prepare-0.log"]


def test_a_file_with_problems_writes_nothing(command: Command) -> None:
    command.spec["resources"] = {"gpusPerNode": 8}
    command.spec["model"] = {"source": "file://./nowhere"}
    code, output = command.start().wait()
    assert code == 2
    assert "--set spec.resources.gpusPerNode=0" in output and "nowhere: correct the path" in output

    command.spec["sft"]["args"] |= {"learning_rat": 1e-4, "output_dir": "/tmp/x"}
    code, output = command.start().wait()
    assert code == 2
    assert "did you mean learning_rate?" in output and "output_dir: is set by posttrain" in output
    assert not (command.folder / ".posttrain").exists()


@pytest.fixture
def programs(command: Command, tmp_path: Path) -> Command:
    """A run of two steps whose completions are programs, half of which pass half of the tests."""
    tests = [{"input": str(number), "output": str(2 * number)} for number in (2, 21)]
    row = {"problem": "Double it.", "verification_info": {"language": "python", "test_cases": tests}}
    (tmp_path / "problems.jsonl").write_text(8 * (json.dumps(row) + "\n"))
    rewarded = {"args": {**GRPO_ARGS, "max_steps": 2}, "rewards": [{"name": "code"}], "sandbox": {"concurrency": 2}}
    del command.spec["sft"]
    command.spec |= {
        "datasets": [{"source": f"file://{tmp_path / 'problems.jsonl'}"}],
        "promptColumn": "problem",
        "grpo": {**rewarded, "trainerClass": "written_programs:ProgramTrainer"},
        "code": {"path": str(Path(__file__).with_name("own_code"))},
        "resources": {"gpusPerNode": 0, "processesPerNode": 1},
        "prepare": {"enabled": False},
    }
    return command


def test_programs_out_of_completions_are_scored_in_a_sandbox_that_goes_with_the_run(programs: Command) -> None:
    code, output = programs.start().wait()

    assert code == 0, output + programs.logs()
    assert scores(programs) == [(0.5, 0.0), (0.5, 0.0)]
    assert "listening on http://127.0.0.1:" in programs.run_folder.log_file("tiny-sandbox-0").read_text()
    assert programs.processes() == []


def test_a_run_goes_on_when_its_sandbox_is_killed_between_two_steps(programs: Command, tmp_path: Path) -> None:
    programs.spec["grpo"]["args"]["max_steps"] = 3
    halts = halt_after_first_step(programs, folder=tmp_path / "halts")
    programs.start()
    programs.wait_for((halts / "between").exists, what="the end of step 1")
    os.kill(main_process(programs, pod="tiny-sandbox-0"), signal.SIGKILL)
    messages = set()
    programs.wait_for(
        lambda: messages.add(told(programs)) or any("sandbox" in message for message in messages),
        what="a word on the sandbox in the status",
    )
    (halts / "between-over").touch()
    code, output = programs.wait()

    assert code == 0, output + programs.logs()
    status = programs.status().status
    assert (status.stage, status.attempt) == ("Succeeded", 1)
    # The programs of the step after it waited for the next sandbox.
    assert scores(programs) == [(0.5, 0.0)] * 3
    assert programs.run_folder.log_file("tiny-sandbox-0").read_text().count("listening on") == 2
    assert "SandboxFailed: pod tiny-sandbox-0 ends with exit code 137" in output
    assert programs.processes() == []


@pytest.mark.parametrize("others", [[{"name": "format"}], []], ids=["another reward", "no other reward"])
def test_programs_that_no_sandbox_runs_any_more_have_no_reward(
    programs: Command, tmp_path: Path, others: list[dict[str, str]]
) -> None:
    with running_sandbox("--concurrency", "2", "--memory-mib", "512") as sandbox:
        programs.spec["grpo"] |= {
            "rewards": [{"name": "code"}, *others],
            "sandbox": {"mode": "Piston", "endpoints": [sandbox.url]},
        }
        halts = halt_after_first_step(programs, folder=tmp_path / "halts")
        programs.start()
        programs.wait_for((halts / "between").exists, what="the end of step 1")
    (halts / "between-over").touch()
    code, output = programs.wait()

    status = programs.status().status
    if others:
        assert code == 0, output + programs.logs()
        assert status.stage == "Succeeded"
        assert unscored(programs) == [0.0, 1.0]
    else:
        assert code == 1, output + programs.logs()
        assert status.failure is not None and status.failure.reason == "RewardFunctionFailed"
        assert "could score any of 4 completions. Programs of code could not be run: no sandbox ran it in" in output
        assert f"the last time {sandbox.url}" in output
        assert unscored(programs) == [0.0]


def halt_after_first_step(command: Command, *, folder: Path) -> Path:
    """Have the run halt between its first two steps, until `between-over` is in the folder, which is returned."""
    folder.mkdir()
    halt = {"function": "faults:Halt", "params": {"folder": str(folder), "between": 1, "inside": -1}}
    command.spec["callbacks"] = [halt]
    return folder


def main_process(command: Command, *, pod: str) -> int:
    """Return the id of the process that a pod's container is."""
    manifest = json.loads(command.run_folder.object_file("Pod", pod).read_text())
    _, (main, _) = json.loads(manifest["metadata"]["annotations"]["posttrain.dev/process"])
    return int(main)


def scores(command: Command) -> list[tuple[float, float]]:
    """Return of each step the mean of the reward `code`, and the share of completions that it did not score."""
    means = [float(step["rewards/code/mean"]) for step in logged_steps(command)]
    return list(zip(means, unscored(command), strict=True))


def unscored(command: Command) -> list[float]:
    """Return of each step the share of completions that the reward `code` did not score; of all of them, no mean."""
    return [float(step["rewards/code/unscored"]) for step in logged_steps(command)]


def logged_steps(command: Command) -> list[dict[str, str]]:
    """Return what was logged of each step."""
    logged = [fact.body.metrics for fact in command.facts() if fact.body.type == "Logged"]
    return [metrics for metrics in logged if "loss" in metrics]


def told(command: Command) -> str:
    """Return what the status says of the run at this moment."""
    conditions = command.status().status.conditions or []
    return next(condition.message for condition in conditions if condition.type == "Succeeded")
