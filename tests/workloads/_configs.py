"""Configs, environments and launches for tests of the workloads."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.api.args import coerce_args, load_table
from posttrain.api.methods import coerce_spec
from posttrain.api.training_run import TrainingRunSpec
from posttrain.contract.config import GangShape, MountedSource, RunIdentity, TrainingConfig, config_hash
from posttrain.contract.facts import FACT, Fact
from posttrain.contract.result import Result

ROOT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 300.0

ARGS: dict[str, Any] = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "max_length": 64,
    "gradient_checkpointing": False,
}

GRPO_ARGS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 8,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "activation_checkpointing": False,
}


def build_config(
    *,
    model: Path,
    rows: Path,
    held_out: Path | None = None,
    name: str = "tiny",
    attempt: int = 1,
    ranks: int = 1,
    nodes: int = 1,
    gpus: int = 0,
    strategy: str = "DDP",
    args: Mapping[str, Any] | None = None,
    **spec: Any,
) -> TrainingConfig:
    """Return the config of an attempt that trains on this machine's files."""
    all_args = coerce_args({**ARGS, **(args or {})}, load_table("sft_config"))
    sft = {"args": all_args, **spec.pop("sft", {})}
    data = {
        "model": {"source": f"file://{model}"},
        "datasets": [{"source": f"file://{rows}"}],
        "sft": sft,
        "parallelism": {"strategy": strategy},
        "resources": {"gpusPerNode": gpus, "processesPerNode": ranks, "numNodes": nodes},
        "checkpoints": {"everySteps": 2},
        **({"evalDatasets": [{"source": f"file://{held_out}"}]} if held_out else {}),
        **spec,
    }
    checked = TrainingRunSpec.model_validate(data)
    return TrainingConfig(
        run=RunIdentity(kind="TrainingRun", namespace="default", name=name),
        attempt=attempt,
        method="sft",
        config_hash=config_hash(checked),
        spec=checked,
        args=all_args,
        model=_mounted(model),
        datasets=(_mounted(rows),),
        eval_datasets=(_mounted(held_out),) if held_out else (),
        gang=GangShape(num_nodes=nodes, processes_per_node=ranks, gpus_per_node=gpus),
    )


def build_grpo_config(
    *,
    model: Path,
    rows: Path,
    rewards: Iterable[Mapping[str, Any]],
    attempt: int = 1,
    ranks: int = 1,
    args: Mapping[str, Any] | None = None,
    model_fields: Mapping[str, Any] | None = None,
    held_out: Path | None = None,
    **spec: Any,
) -> TrainingConfig:
    """Return the config of an attempt that is rewarded for its answers to the column `problem`."""
    grpo = {"rewards": list(rewards), "args": {**GRPO_ARGS, **(args or {})}, **spec.pop("grpo", {})}
    checked = coerce_spec(
        TrainingRunSpec.model_validate(
            {
                "model": {"source": f"file://{model}", **(model_fields or {})},
                "datasets": [{"source": f"file://{rows}"}],
                **({"evalDatasets": [{"source": f"file://{held_out}"}]} if held_out else {}),
                "promptColumn": "problem",
                "grpo": grpo,
                "code": {"path": "own"},
                "resources": {"gpusPerNode": 0, "processesPerNode": ranks},
                "checkpoints": {"everySteps": 2},
                **spec,
            }
        )
    )
    return TrainingConfig(
        run=RunIdentity(kind="TrainingRun", namespace="default", name="tiny-grpo"),
        attempt=attempt,
        method="grpo",
        config_hash=config_hash(checked),
        spec=checked,
        args=checked.training.args,
        model=_mounted(model),
        datasets=(_mounted(rows),),
        eval_datasets=(_mounted(held_out),) if held_out else (),
        gang=GangShape(num_nodes=1, processes_per_node=ranks, gpus_per_node=0),
    )


def _mounted(path: Path) -> MountedSource:
    return MountedSource(mount="files", path=str(path.relative_to("/")))


@dataclass
class Pod:
    """One container of an attempt, as the operator would start it."""

    storage: Path
    folder: Path
    """Its own: runtime, termination message, log."""
    python: Path
    config: TrainingConfig
    workload: str = "sft"
    node: int = 0
    port: int = 0
    facts_url: str | None = None
    code: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    without: Iterable[str] = ()
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Pod:
        """Start its process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(self.config.to_json())
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [self.python, "-m", "posttrain_workloads.launch", self.workload],
                env=self.environment(),
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self

    def environment(self) -> dict[str, str]:
        """Return all of the process's environment."""
        runtime = self.folder / "runtime"
        python_path = [str(ROOT / "operator"), str(ROOT / "workloads")]
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "PYTHONPATH": os.pathsep.join([str(self.code), *python_path] if self.code else python_path),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HOME": str(self.storage / "hf-home"),
            "HF_HUB_OFFLINE": "1",
            "TORCH_EXTENSIONS_DIR": str(Path.home() / ".cache" / "torch_extensions"),
            "POSTTRAIN_CONFIG": str(self.folder / "config.json"),
            "POSTTRAIN_STORAGE": str(self.storage),
            "POSTTRAIN_RUNTIME": str(runtime),
            "POSTTRAIN_TERMINATION": str(self.folder / "termination-log"),
            "POSTTRAIN_MOUNT_FILES": "/",
            "PET_NNODES": str(self.config.gang.num_nodes),
            "PET_NPROC_PER_NODE": str(self.config.gang.processes_per_node),
            "PET_NODE_RANK": str(self.node),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(self.port or free_port()),
            **({"POSTTRAIN_CODE": str(self.code)} if self.code else {}),
            **({"POSTTRAIN_FACTS_URL": self.facts_url} if self.facts_url else {}),
            **self.env,
        }
        if self.config.spec.parallelism.strategy.startswith("ZeRO"):
            deepspeed = self.folder / "deepspeed.json"
            deepspeed.write_text(json.dumps(build_deepspeed(int(self.config.spec.parallelism.strategy[-1]))))
            environment |= {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(deepspeed),
            }
        return {name: value for name, value in environment.items() if name not in set(self.without)}

    @property
    def log(self) -> Path:
        """Return the file of its output."""
        return self.folder / "log"

    def wait(self) -> int:
        """Wait for its end; return the exit code."""
        assert self.process is not None
        try:
            return self.process.wait(timeout=WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"it did not end in {WAIT_SECONDS} s:\n{self.log.read_text()[-6000:]}") from None

    def run(self) -> int:
        """Start it and wait for its end; return the exit code."""
        return self.start().wait()

    def wait_until(self, condition: Callable[[], bool], *, what: str) -> None:
        """Wait until something is so; fail if the process ends first."""
        assert self.process is not None
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{what}: never, up to the end of\n{self.log.read_text()[-6000:]}")
            time.sleep(0.05)

    def kill_rank(self, rank: int) -> None:
        """End a rank as the kernel would."""
        os.kill(rank_pid(self, rank), signal.SIGKILL)

    def result(self) -> Result:
        """Return its termination message."""
        return Result.model_validate_json((self.folder / "termination-log").read_text())

    def facts(self) -> list[Fact]:
        """Return the facts of its node, of all attempts."""
        file = self.storage / ("facts.jsonl" if self.node == 0 else f"facts-{self.node}.jsonl")
        return [FACT.validate_json(line) for line in file.read_bytes().splitlines()]

    def bodies(self, kind: str) -> list[Any]:
        """Return the bodies of its facts of one type."""
        return [fact.body for fact in self.facts() if fact.body.type == kind]

    def log_history(self) -> list[dict[str, Any]]:
        """Return the trainer's log of the run so far."""
        history: list[dict[str, Any]] = json.loads((self.storage / "trainer_state.json").read_text())["log_history"]
        return history

    def last_step(self) -> int:
        """Return the step that its ranks did last."""
        file = self.folder / "runtime" / "last-step"
        return int(file.read_text()) if file.exists() else 0


def rank_pid(pod: Pod, rank: int) -> int:
    """Return the process id of a rank, which only its environment tells."""
    assert pod.process is not None
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        ours = f"POSTTRAIN_RUNTIME={pod.folder / 'runtime'}".encode() in environment
        if (
            ours
            and f"RANK={rank}".encode() in environment
            and f"posttrain_workloads.{pod.workload}".encode() in command
        ):
            return int(process.name)
    raise AssertionError(f"there is no rank {rank}")


def build_deepspeed(stage: int) -> dict[str, Any]:
    """Return a DeepSpeed configuration as the plan writes it."""
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
    }


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
