"""GRPO under launch and torchrun, with real TRL and a tiny model: whole runs, killed ones, resumed ones."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from posttrain.contract.checkpoints import Marker
from posttrain.contract.completions import completions_file
from posttrain.contract.config import TrainingConfig
from posttrain_workloads.checkpoints import verify_folder
from tests.workloads._configs import Pod, build_grpo_config
from tests.workloads._prepare_configs import ROOT

pytestmark = pytest.mark.workloads

OWN_CODE = Path(__file__).with_name("own_code")


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight sums."""
    file = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    rows = [{"problem": f"How much is {n} + 1?", "solution": f"${n + 1}$"} for n in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def build_pod(folder: Path, python: Path, config: TrainingConfig) -> Pod:
    return Pod(
        storage=folder / "storage",
        folder=folder / f"attempt-{config.attempt}",
        python=python,
        config=config,
        workload="grpo",
        code=OWN_CODE,
    )


def points(pod: Pod) -> list[dict[str, Any]]:
    """Return the log lines of steps, without what a clock says."""
    clocks = ("runtime", "per_second", "step_time")
    return [
        {name: value for name, value in entry.items() if not name.endswith(clocks) and not name.startswith("time/")}
        for entry in pod.log_history()
        if "loss" in entry
    ]


def test_a_run_trains_on_several_rewards_and_keeps_what_they_scored(
    tmp_path: Path, trainer_python: Path, tiny_model: Path, problems: Path
) -> None:
    config = build_grpo_config(
        model=tiny_model,
        rows=problems,
        rewards=[
            {"name": "accuracy"},
            {"function": "own_rewards:short", "weight": "0.5"},
            {"function": "own_rewards:picky"},
            {"function": "own_rewards:slow", "weight": "0.1"},
        ],
        args={"max_steps": 2, "beta": 0.1},
        systemPrompt="Answer in one word.",
    )
    pod = build_pod(tmp_path, trainer_python, config)
    assert pod.run() == 0, pod.log.read_text()[-6000:]
    assert isinstance(verify_folder(pod.storage / "model"), Marker)
    assert pod.result().metrics["steps"] == "2"

    [first, second] = [entry for entry in pod.log_history() if "loss" in entry]
    for entry in (first, second):
        parts = [entry[f"rewards/{name}/mean"] for name in ("accuracy", "short", "slow")]
        assert parts[0] == 0
        assert parts[1] < 0
        assert parts[2] < 0
        split = [entry[f"time/{name}"] for name in ("rollout", "rewards", "training")]
        assert min(split) > 0
        assert sum(split) == pytest.approx(entry["time/step"])
        assert entry["kl"] is not None
    logged = [body.metrics for body in pod.bodies("Logged") if "loss" in body.metrics]
    assert [float(metrics["reward"]) for metrics in logged] == [first["reward"], second["reward"]]

    command = [trainer_python, "-m", "posttrain_workloads.completions", pod.storage / completions_file(1)]
    out = subprocess.run(command, env=pod.environment(), capture_output=True, text=True, check=True).stdout
    rows = json.loads(out)
    assert len(rows) == 4
    assert {row["prompt"].partition("\n")[0] for row in rows} == {"system: Answer in one word."}
    for row in rows:
        assert row["reward/short"] < 0
        assert row["reward/slow"] == pytest.approx(-len(row["completion"]) / 100)
        assert row["reward/picky"] in {None, 1.0}
        assert isinstance(row["advantage"], float)
    unscored = [row["reward/picky"] is None for row in rows]
    assert sum(unscored) / 4 == first["rewards/picky/failed"] == first["rewards/picky/unscored"]


def test_a_killed_run_goes_on_within_a_rollout_as_if_nothing_had_been(
    tmp_path: Path, trainer_python: Path, tiny_model: Path, problems: Path
) -> None:
    """A rollout serves four steps, a checkpoint comes after three, and the kill is in the second pass over the data."""

    def build(name: str, *, attempt: int = 1) -> Pod:
        config = build_grpo_config(
            model=tiny_model,
            rows=problems,
            ranks=2,
            attempt=attempt,
            rewards=[{"function": "own_rewards:record", "params": {"file": str(tmp_path / "rows")}}],
            args={
                "max_steps": 15,
                "per_device_train_batch_size": 1,
                "steps_per_generation": 2,
                "num_iterations": 2,
                "beta": 0.1,
            },
            checkpoints={"everySteps": 3},
        )
        return build_pod(tmp_path / name, trainer_python, config)

    def rows_of_steps() -> dict[int, list[list[int]]]:
        lines = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
        (tmp_path / "rows").unlink()
        steps: dict[int, list[list[int]]] = {}
        for step, rows in lines:
            if rows not in steps.setdefault(step, []):
                steps[step].append(rows)
        return {step: sorted(found) for step, found in steps.items()}

    undisturbed = build("undisturbed")
    assert undisturbed.run() == 0, undisturbed.log.read_text()[-6000:]
    expected = rows_of_steps()

    killed = build("disturbed").start()
    killed.wait_until((killed.storage / "checkpoint-9" / ".posttrain-complete.json").exists, what="step 9")
    killed.kill_rank(1)
    assert killed.wait() == 138, killed.log.read_text()[-6000:]
    resumed = build("disturbed", attempt=2)
    assert resumed.run() == 0, resumed.log.read_text()[-6000:]
    assert resumed.bodies("Started")[-1].resumed_from_step in {9, 12}
    assert points(resumed) == points(undisturbed)
    assert rows_of_steps() == expected


RESTORE = """
import sys
from pathlib import Path
from types import SimpleNamespace
from posttrain_workloads._compat import restore_rollout, save_rollout

def trainer(*, ranks, step, batches):
    args = SimpleNamespace(world_size=ranks, steps_per_generation=2, device="cpu")
    return SimpleNamespace(args=args, num_iterations=2, _step=step, _buffered_inputs=batches)

for step in (6, 8):  # within a cycle of four micro-batches, and at its end
    save_rollout(trainer(ranks=2, step=step, batches=["kept"]), Path(sys.argv[1]), rank=0)
    for ranks in (2, 1):
        resumed = trainer(ranks=ranks, step=0, batches=None)
        print(restore_rollout(resumed, Path(sys.argv[1]), rank=0), resumed._step, resumed._buffered_inputs)
print(restore_rollout(None, Path(sys.argv[1]), rank=1))
"""


def test_a_gang_of_another_size_learns_that_a_begun_rollout_is_not_its(tmp_path: Path, trainer_python: Path) -> None:
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("operator", "workloads"))}
    done = subprocess.run(
        [trainer_python, "-c", RESTORE, tmp_path], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["True 6 ['kept']", "False 0 None", "True 8 None", "True 0 None", "True"]


def test_a_run_that_nothing_rewards_ends_at_once(
    tmp_path: Path, trainer_python: Path, tiny_model: Path, problems: Path
) -> None:
    config = build_grpo_config(model=tiny_model, rows=problems, rewards=[{"function": "own_rewards:silent"}])
    pod = build_pod(tmp_path, trainer_python, config)
    assert pod.run() == 1
    result = pod.result()
    assert (result.reason, result.message) == (
        "RewardFunctionFailed",
        "no reward (silent) could score any of 4 completions, and none raised an error: each of them returned None",
    )
