"""A rank's life under launch and torchrun, with real TRL and a tiny model: whole runs, killed ones, resumed ones."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from posttrain.contract.checkpoints import Marker
from posttrain.contract.config import TrainingConfig
from posttrain_workloads.checkpoints import verify_folder
from tests.workloads._configs import Pod, build_config
from tests.workloads._server import FactsServer

pytestmark = pytest.mark.workloads

OWN_CODE = Path(__file__).with_name("own_code")


def build_pod(tmp_path: Path, python: Path, config: TrainingConfig, **fields: Any) -> Pod:
    return Pod(
        storage=fields.pop("storage", tmp_path / "storage"),
        folder=tmp_path / f"attempt-{config.attempt}",
        python=python,
        config=config,
        **fields,
    )


def points(pod: Pod) -> list[dict[str, Any]]:
    """Return the log lines of steps and evaluations, without what a clock says."""
    clocks = ("runtime", "per_second")
    return [
        {name: value for name, value in entry.items() if not name.endswith(clocks)}
        for entry in pod.log_history()
        if "loss" in entry or "eval_loss" in entry
    ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, trainer_python: Path, tiny_model: Path, rows: Path, held_out: Path):
    """A run of one rank that goes through, and the server it told of it."""
    folder = tmp_path_factory.mktemp("plain")
    server = FactsServer()
    config = build_config(model=tiny_model, rows=rows, held_out=held_out, checkpoints={"everySteps": 2, "keepLast": 2})
    token = folder / "token"
    token.write_text("secret")
    env = {"KUBEFLOW_TRAINER_SERVER_URL": server.status_url, "KUBEFLOW_TRAINER_SERVER_TOKEN": str(token)}
    pod = build_pod(folder, trainer_python, config, facts_url=server.url, env=env)
    assert pod.run() == 0, pod.log.read_text()[-6000:]
    return pod, server


def test_a_run_ends_with_a_marked_model_and_its_last_checkpoints(plain: tuple[Pod, FactsServer]) -> None:
    pod, _ = plain
    for name, step in (("model", 6), ("checkpoint-4", 4), ("checkpoint-6", 6)):
        marker = verify_folder(pod.storage / name)
        assert isinstance(marker, Marker), marker
        assert marker.step == step
    assert sorted(folder.name for folder in pod.storage.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert {file.name for file in (pod.storage / "model").iterdir()} >= {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    }
    config = json.loads((pod.storage / "model" / "config.json").read_text())
    assert config["use_cache"] is True
    assert config["dtype"] == "float32"


def test_a_run_reports_its_result_in_facts_and_in_the_termination_message(plain: tuple[Pod, FactsServer]) -> None:
    pod, server = plain
    result = pod.result()
    assert result.reason == "Completed"
    assert result.metrics["steps"] == "6"
    assert float(result.metrics["eval_loss"]) == pytest.approx(points(pod)[-1]["eval_loss"])
    assert result.artifacts == {
        "model": "pvc://tiny/tiny/model",
        "trainer_state": "pvc://tiny/tiny/trainer_state.json",
    }
    assert [fact.body for fact in server.taken[1, "launch-0"]] == pod.bodies("Result")
    assert pod.bodies("Result")[0].last_step == 6


def test_every_fact_of_a_run_arrived_in_order(plain: tuple[Pod, FactsServer]) -> None:
    pod, server = plain
    arrived = server.taken[1, "rank-0"]
    assert arrived == [fact for fact in pod.facts() if fact.source == "rank-0"]
    kinds = [fact.body.type for fact in arrived]
    assert kinds[:3] == ["Phase", "Started", "Phase"]
    assert [fact.body.step for fact in arrived if fact.body.type == "CheckpointSaved"] == [2, 4, 6]
    started = pod.bodies("Started")[0]
    assert (started.world_size, started.max_steps, started.resumed_from_step) == (1, 6, 0)
    assert started.versions["trl"] == "1.16.0"
    assert [fact.body.phase for fact in arrived if fact.body.type == "Phase"] == [
        "loading",
        "training",
        "evaluating",
        "training",
        "saving",
    ]


def test_progress_is_posted_too_for_those_who_watch(plain: tuple[Pod, FactsServer]) -> None:
    """A run of seconds posts at its begin and its end only: upstream's callback waits 5 s between posts."""
    _, server = plain
    assert server.statuses[0]["metrics"] == [{"name": "total_steps", "value": "6"}]
    assert server.statuses[-1]["progressPercentage"] == 100
    assert server.headers[-1]["Authorization"] == "Bearer secret"


def test_the_curve_in_the_facts_is_the_trainers_own(plain: tuple[Pod, FactsServer]) -> None:
    pod, _ = plain
    logged = [body for body in pod.bodies("Logged") if "loss" in body.metrics]
    history = [entry for entry in pod.log_history() if "loss" in entry]
    assert [(body.step, float(body.metrics["loss"])) for body in logged] == [
        (entry["step"], entry["loss"]) for entry in history
    ]
    assert [entry["step"] for entry in history] == [1, 2, 3, 4, 5, 6]


def test_the_trained_model_loads_and_ends_its_turns(plain: tuple[Pod, FactsServer], trainer_python: Path) -> None:
    pod, _ = plain
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert m.generation_config.eos_token_id == t.eos_token_id, m.generation_config\n"
        "assert t.chat_template and m.dtype.is_floating_point"
    )
    subprocess.run([trainer_python, "-c", code, pod.storage / "model"], check=True, capture_output=True)


def test_an_attempt_that_finds_every_step_done_only_saves_the_model(
    plain: tuple[Pod, FactsServer], tmp_path: Path
) -> None:
    """The last step lies in the middle of an epoch, where transformers would take one more."""
    pod, _ = plain
    storage = tmp_path / "storage"
    shutil.copytree(pod.storage, storage)
    shutil.rmtree(storage / "model")
    again = build_pod(tmp_path, pod.python, replace_attempt(pod.config, 2), storage=storage)
    assert again.run() == 0, again.log.read_text()[-6000:]
    assert again.result().metrics["steps"] == "6"
    assert again.result().metrics["eval_loss"] == pod.result().metrics["eval_loss"]
    weights = "model/model.safetensors"
    assert (storage / weights).read_bytes() == (pod.storage / weights).read_bytes()
    assert isinstance(verify_folder(storage / "model"), Marker)


def test_a_killed_rank_costs_only_the_steps_since_the_newest_whole_checkpoint(
    tmp_path: Path, trainer_python: Path, tiny_model: Path, rows: Path
) -> None:
    """Two ranks, ZeRO-2: killed, its newest checkpoint cut short, resumed; every later number is bitwise the same.

    Log lines fall between the checkpoints, so the sums that transformers does not save matter too. The last part is
    the control: the same comparison fails where the data order is not restored.
    """

    def build(folder: str, *, attempt: int = 1, **args: Any) -> Pod:
        config = build_config(
            model=tiny_model,
            rows=rows,
            ranks=2,
            strategy="ZeRO2",
            attempt=attempt,
            args={"max_steps": 11, "logging_steps": 3, "per_device_train_batch_size": 1, **args},
            checkpoints={"everySteps": 2, "keepLast": 3},
        )
        return build_pod(tmp_path / folder, trainer_python, config)

    undisturbed = build("undisturbed")
    assert undisturbed.run() == 0, undisturbed.log.read_text()[-6000:]

    killed = build("disturbed").start()
    killed.wait_until((killed.storage / "checkpoint-8" / ".posttrain-complete.json").exists, what="step 8")
    killed.kill_rank(1)
    assert killed.wait() == 138, killed.log.read_text()[-6000:]
    result = killed.result()
    assert (result.reason, result.rank) == ("RankKilled", 1)
    first_error = killed.bodies("FirstError")[0]
    assert (first_error.reason, first_error.rank) == ("RankKilled", 1)

    marked = killed.storage.glob("checkpoint-*/.posttrain-complete.json")
    newest = max(int(marker.parent.name.removeprefix("checkpoint-")) for marker in marked)
    with (killed.storage / f"checkpoint-{newest}" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    control = tmp_path / "control" / "storage"
    shutil.copytree(killed.storage, control)

    resumed = build("disturbed", attempt=2)
    assert resumed.run() == 0, resumed.log.read_text()[-6000:]
    assert [body.step for body in resumed.bodies("CheckpointSkipped")] == [newest]
    assert [body.resumed_from_step for body in resumed.bodies("Started")] == [0, newest - 2]
    assert points(resumed) == points(undisturbed)

    unskipped = build("control", attempt=2, ignore_data_skip=True)
    (control / "run.json").unlink()  # another spec, which is otherwise refused
    assert unskipped.run() == 0, unskipped.log.read_text()[-6000:]
    assert points(unskipped) != points(undisturbed)


def test_a_kill_between_save_and_marker_leaves_the_only_other_checkpoint(
    tmp_path: Path, trainer_python: Path, tiny_model: Path, rows: Path
) -> None:
    config = build_config(
        model=tiny_model,
        rows=rows,
        checkpoints={"everySteps": 2, "keepLast": 1},
        code={"path": str(OWN_CODE)},
        callbacks=[{"function": "faults:KillAfterSave", "params": {"step": 4, "flag": str(tmp_path / "flag")}}],
    )
    first = build_pod(tmp_path, trainer_python, config, code=OWN_CODE)
    assert first.run() == 138, first.log.read_text()[-6000:]
    assert first.result().reason == "RankKilled"
    assert isinstance(verify_folder(first.storage / "checkpoint-2"), Marker)
    assert (first.storage / "checkpoint-4").is_dir()

    second = build_pod(tmp_path, trainer_python, replace_attempt(config, 2), code=OWN_CODE)
    assert second.run() == 0, second.log.read_text()[-6000:]
    skipped = second.bodies("CheckpointSkipped")[0]
    assert (skipped.step, skipped.reason) == (4, "it has no marker: its writing was interrupted")
    assert second.bodies("Started")[-1].resumed_from_step == 2
    assert [folder.name for folder in second.storage.glob("checkpoint-*")] == ["checkpoint-6"]


def test_told_to_stop_two_ranks_save_a_checkpoint_that_waits_for_the_slower_one(
    tmp_path: Path, trainer_python: Path, tiny_model: Path, rows: Path
) -> None:
    config = build_config(
        model=tiny_model,
        rows=rows,
        ranks=2,
        args={"max_steps": 1000, "per_device_train_batch_size": 1},
        checkpoints={"everySteps": 1000},
        code={"path": str(OWN_CODE)},
        callbacks=[{"function": "faults:SlowShard", "params": {"rank": 1, "seconds": 2}}],
    )
    pod = build_pod(tmp_path, trainer_python, config, code=OWN_CODE).start()
    pod.wait_until(lambda: pod.last_step() >= 2, what="step 2")
    assert pod.process is not None
    pod.process.terminate()
    assert pod.wait() == 143, pod.log.read_text()[-6000:]
    step = pod.last_step()
    result = pod.result()
    assert (result.reason, result.message) == ("Terminated", f"told to stop: a checkpoint was saved at step {step}")
    assert pod.bodies("FirstError") == []
    marker = verify_folder(pod.storage / f"checkpoint-{step}")
    assert isinstance(marker, Marker), marker
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.path for file in marker.files}
    assert [body.step for body in pod.bodies("CheckpointSaved")] == [step]
    assert not (pod.storage / "model").exists()


def test_a_loss_that_is_no_number_ends_the_run_at_its_step(
    tmp_path: Path, trainer_python: Path, tiny_model: Path, rows: Path
) -> None:
    config = build_config(
        model=tiny_model,
        rows=rows,
        args={"logging_steps": 5},
        checkpoints={"everySteps": 1},
        code={"path": str(OWN_CODE)},
        sft={"trainerClass": "faults:NanTrainer"},
    )
    pod = build_pod(tmp_path, trainer_python, config, code=OWN_CODE)
    assert pod.run() == 1
    result = pod.result()
    assert (result.reason, result.message) == ("NonFiniteLoss", "loss was not finite at step 3")
    assert [(body.metric, body.step) for body in pod.bodies("NonFinite")] == [("loss", 3)]
    assert pod.bodies("FirstError")[0].reason == "NonFiniteLoss"
    assert sorted(folder.name for folder in pod.storage.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_run_that_is_only_to_be_warned_of_such_a_loss_goes_on(
    tmp_path: Path, trainer_python: Path, tiny_model: Path, rows: Path
) -> None:
    config = build_config(
        model=tiny_model,
        rows=rows,
        args={"logging_steps": 1, "max_steps": 5},
        code={"path": str(OWN_CODE)},
        sft={"trainerClass": "faults:NanTrainer"},
        restarts={"onNonFinite": "Warn"},
    )
    pod = build_pod(tmp_path, trainer_python, config, code=OWN_CODE)
    assert pod.run() == 0, pod.log.read_text()[-6000:]
    assert pod.last_step() == 5
    assert [(body.metric, body.step) for body in pod.bodies("NonFinite")] == [("loss", 3)]
    assert pod.log.read_text().count("loss was not finite at step 3, and the training goes on") == 1


def test_an_adapter_is_saved_with_the_name_of_its_base(
    tmp_path: Path, trainer_python: Path, tiny_model: Path, rows: Path
) -> None:
    config = build_config(
        model=tiny_model, rows=rows, args={"max_steps": 2}, peft={"rank": 4, "dropout": "0"}, name="adapter"
    )
    pod = build_pod(tmp_path, trainer_python, config)
    assert pod.run() == 0, pod.log.read_text()[-6000:]
    adapter = json.loads((pod.storage / "model" / "adapter_config.json").read_text())
    assert adapter["r"] == 4
    assert adapter["base_model_name_or_path"] == str(tiny_model)
    assert (pod.storage / "model" / "adapter_model.safetensors").exists()
    assert not (pod.storage / "model" / "model.safetensors").exists()


def replace_attempt(config: TrainingConfig, attempt: int) -> TrainingConfig:
    return config.model_copy(update={"attempt": attempt})
