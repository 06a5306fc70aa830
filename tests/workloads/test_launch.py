"""The process of every container: what it starts, what it refuses, what is left when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.contract.config import TrainingConfig
from posttrain_workloads.launch import count_oom_kills
from posttrain_workloads.storage import StorageHoldsAnotherRun, claim_storage
from tests.support.processes import is_alive, wait_for
from tests.workloads._configs import Pod, build_config, free_port, rank_pid

OWN_CODE = Path(__file__).with_name("own_code")
NOWHERE = Path("/nowhere/model")


def build_pod(tmp_path: Path, config: TrainingConfig, *, python: Path = Path(sys.executable), **fields) -> Pod:
    name = f"pod-{fields.get('node', 0)}"
    return Pod(storage=tmp_path / "storage", folder=tmp_path / name, python=python, config=config, **fields)


def test_launch_imports_neither_torch_nor_anything_that_does() -> None:
    code = "import sys, posttrain_workloads.launch; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_config_of_another_version_ends_as_the_platforms_error(tmp_path: Path) -> None:
    pod = build_pod(tmp_path, build_config(model=NOWHERE, rows=NOWHERE))
    environment = pod.environment()
    pod.folder.mkdir()
    data = json.loads(pod.config.to_json()) | {"newer": 1}
    Path(environment["POSTTRAIN_CONFIG"]).write_text(json.dumps(data))
    done = subprocess.run([pod.python, "-m", "posttrain_workloads.launch", "sft"], env=environment, check=False)
    assert done.returncode == 2
    assert pod.result().reason == "ConfigInvalid"
    assert "newer" in pod.result().message
    assert not pod.storage.exists()


def test_a_storage_with_another_runs_results_is_left_as_it_is(tmp_path: Path) -> None:
    config = build_config(model=NOWHERE, rows=NOWHERE)
    claim_storage(tmp_path / "storage", config)
    (tmp_path / "storage" / "model").touch()
    before = {file: file.read_bytes() for file in (tmp_path / "storage").iterdir()}
    other = build_config(model=NOWHERE, rows=NOWHERE, args={"learning_rate": 0.5})
    pod = build_pod(tmp_path, other)
    assert pod.run() == 2
    assert pod.result().reason == "StorageHoldsAnotherRun"
    assert config.config_hash in pod.result().message
    assert {file: file.read_bytes() for file in (tmp_path / "storage").iterdir()} == before


def test_a_storage_is_claimed_once_whoever_comes_first(tmp_path: Path) -> None:
    config = build_config(model=NOWHERE, rows=NOWHERE)
    claim_storage(tmp_path, config)
    claim_storage(tmp_path, config.model_copy(update={"attempt": 2}))
    assert json.loads((tmp_path / "run.json").read_text()) == {"name": "tiny", "configHash": config.config_hash}
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(StorageHoldsAnotherRun, match="holds the results of tiny with another spec"):
        claim_storage(tmp_path, build_config(model=NOWHERE, rows=NOWHERE, args={"max_steps": 7}))


def test_a_storage_without_results_goes_to_the_next_run_of_the_name(tmp_path: Path) -> None:
    claim_storage(tmp_path, build_config(model=NOWHERE, rows=NOWHERE))
    for name in ("facts.jsonl", "facts.ack.json", "facts-1.jsonl"):
        (tmp_path / name).touch()
    mended = build_config(model=NOWHERE, rows=NOWHERE, args={"max_steps": 7})

    claim_storage(tmp_path, mended)

    assert json.loads((tmp_path / "run.json").read_text()) == {"name": "tiny", "configHash": mended.config_hash}
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("cgroup", "files", "kills"),
    [
        ("0::/\n", {"memory.events": "low 0\noom 3\noom_kill 2\n"}, 2),
        ("0::/user.slice/a.scope\n", {"user.slice/a.scope/memory.events": "oom_kill 1\n"}, 1),
        ("4:memory:/kubepods/x\n0::/\n", {"memory/memory.oom_control": "under_oom 0\noom_kill 5\n"}, 5),
        (
            "4:cpu,memory:/x\n",
            {"memory/x/memory.oom_control": "oom_kill 4\n", "memory/memory.oom_control": "oom_kill 9\n"},
            4,
        ),
        ("0::/\n", {}, 0),
    ],
)
def test_oom_kills_are_counted_in_the_containers_own_cgroup(
    tmp_path: Path, cgroup: str, files: dict[str, str], kills: int
) -> None:
    (tmp_path / "self").write_text(cgroup)
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert count_oom_kills(root=tmp_path / "cgroup", own=tmp_path / "self") == kills


@pytest.mark.workloads
def test_told_to_stop_before_the_first_step_it_ends_at_once(
    tmp_path: Path, trainer_python: Path, tiny_model: Path, rows: Path
) -> None:
    pod = build_pod(tmp_path, build_config(model=tiny_model, rows=rows), python=trainer_python).start()
    assert pod.process is not None
    pod.wait_until((pod.folder / "runtime" / "log-0").exists, what="the start")
    pod.process.terminate()
    assert pod.wait() == 143
    assert pod.result().reason == "Terminated"
    assert pod.bodies("Started") == pod.bodies("FirstError") == []


@pytest.mark.workloads
def test_nothing_outlives_a_killed_launch(tmp_path: Path, trainer_python: Path, tiny_model: Path, rows: Path) -> None:
    config = build_config(model=tiny_model, rows=rows, args={"max_steps": 1000}, checkpoints={"everySteps": 1000})
    pod = build_pod(tmp_path, config, python=trainer_python).start()
    assert pod.process is not None
    pod.wait_until(lambda: pod.last_step() >= 1, what="step 1")
    rank = rank_pid(pod, 0)
    torchrun = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
    assert is_alive(torchrun)
    os.kill(pod.process.pid, signal.SIGKILL)
    pod.process.wait()
    wait_for(lambda: not is_alive(torchrun) and not is_alive(rank), what="the end of torchrun and its rank", seconds=30)


@pytest.mark.workloads
def test_a_crash_in_native_code_is_told_with_the_last_words_of_its_rank(
    tmp_path: Path, trainer_python: Path, tiny_model: Path, rows: Path
) -> None:
    config = build_config(
        model=tiny_model, rows=rows, code={"path": str(OWN_CODE)}, callbacks=[{"function": "faults:Abort"}]
    )
    pod = build_pod(tmp_path, config, python=trainer_python, code=OWN_CODE)
    assert pod.run() == 1
    result = pod.result()
    assert (result.reason, result.rank) == ("RankCrashed", 0)
    assert "rank 0 ended by SIGABRT; the log ends with:" in result.message
    assert "the last words" in result.message
    assert "[rank 0] the last words\n" in pod.log.read_text()


@pytest.mark.workloads
def test_two_nodes_train_as_one_gang(tmp_path: Path, trainer_python: Path, tiny_model: Path, rows: Path) -> None:
    port = free_port()
    config = build_config(
        model=tiny_model,
        rows=rows,
        nodes=2,
        args={"max_steps": 2},
        checkpoints={"everySteps": 1, "storage": {"size": "1Gi", "accessMode": "ReadWriteMany"}},
    )
    pods = [build_pod(tmp_path, config, python=trainer_python, node=node, port=port).start() for node in (0, 1)]
    assert [pod.wait() for pod in pods] == [0, 0], "\n".join(pod.log.read_text()[-3000:] for pod in pods)
    assert pods[0].bodies("Started")[0].world_size == 2
    assert pods[0].result().artifacts["model"] == "pvc://tiny/tiny/model"
    assert pods[1].result().artifacts == {}
    assert [fact.source for fact in pods[1].facts()] == ["launch-1"]
    assert "[rank 1] " in pods[1].log.read_text()


@pytest.mark.workloads
def test_a_rank_killed_on_one_node_is_no_error_of_the_other(
    tmp_path: Path, trainer_python: Path, tiny_model: Path, rows: Path
) -> None:
    port = free_port()
    config = build_config(
        model=tiny_model,
        rows=rows,
        nodes=2,
        args={"max_steps": 1000},
        checkpoints={"everySteps": 1000, "storage": {"size": "1Gi", "accessMode": "ReadWriteMany"}},
    )
    pods = [build_pod(tmp_path, config, python=trainer_python, node=node, port=port).start() for node in (0, 1)]
    pods[1].wait_until(lambda: pods[1].last_step() >= 2, what="step 2")
    pods[1].kill_rank(1)
    assert [pod.wait() for pod in pods] == [138, 138]
    assert [pod.result().reason for pod in pods] == ["PeerLost", "RankKilled"]
    assert pods[0].bodies("FirstError") == []
    assert [(body.reason, body.rank) for body in pods[1].bodies("FirstError")] == [("RankKilled", 1)]
    assert pods[1].bodies("Result")[0].last_step >= 2


@pytest.mark.workloads
def test_without_its_number_of_nodes_a_gang_is_refused_by_its_ranks(
    tmp_path: Path, trainer_python: Path, tiny_model: Path, rows: Path
) -> None:
    config = build_config(model=tiny_model, rows=rows, nodes=2, args={"max_steps": 2})
    port = free_port()
    pods = [
        build_pod(tmp_path, config, python=trainer_python, node=node, port=port, without=["PET_NNODES"]).start()
        for node in (0, 1)
    ]
    assert [pod.wait() for pod in pods] == [2, 2], "\n".join(pod.log.read_text()[-3000:] for pod in pods)
    results = [pod.result() for pod in pods]
    assert [result.reason for result in results] == ["WorldSizeMismatch", "WorldSizeMismatch"]
    assert results[0].message == "2 ranks are planned (2 nodes with 1 each), and 1 met"
    assert results[0].rank == 0
    assert list((tmp_path / "storage").glob("checkpoint-*")) == []
