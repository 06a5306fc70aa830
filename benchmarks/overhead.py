"""What posttrain's rank costs a step of training against plain TRL: the parts that the benchmarks of all methods share.

It owns how runs of each variant are done in turn and timed; it must not know how a method trains: a script of its own
has `build_config` (the run), `train_plainly` (with TRL's own trainer) and `train` (the rank's).
"""

# ruff: noqa: ARG002 - the trainer hands every argument to every event

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INPUTS = ROOT / "examples" / "quickstart" / "inputs"
PLAIN = "plain"
REPORTING = "posttrain"
UNREACHABLE = "unreachable"


def parse_options(description: str | None, *, pairs: int, steps: int, every: int, batch: int) -> argparse.Namespace:
    """Return what the command line asks for; the numbers are the defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=pairs)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--every", type=int, default=every, help="steps between checkpoints")
    parser.add_argument("--batch", type=int, default=batch, help="rows of a step, or completions")
    parser.add_argument("--python", type=Path, help="the trainer's interpreter (default: `posttrain env trainer`)")
    return parser.parse_args()


def run_in_turn(
    script: str, variants: Sequence[str], options: argparse.Namespace, *, python_path: Sequence[Path] = ()
) -> dict[str, list[dict[str, Any]]]:
    """Return what the timer of each run wrote, by variant, in the order of the pairs."""
    sys.path.insert(0, str(ROOT))
    from tests.workloads._server import FactsServer

    server = FactsServer()
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent, tempfile.TemporaryDirectory() as folder:
        addresses = {
            PLAIN: None,
            REPORTING: [server.url, server.status_url],
            UNREACHABLE: [f"http://127.0.0.1:{silent.getsockname()[1]}/{path}" for path in ("facts", "status")],
        }
        task = {
            "folder": folder,
            "script": script,
            "runs": [(variant, addresses[variant]) for _ in range(options.pairs) for variant in variants],
            "steps": options.steps,
            "every": options.every,
            "batch": options.batch,
        }
        parts = [*(ROOT / part for part in ("benchmarks", "operator", "workloads", ".")), *python_path]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, parts)),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": f"{folder}/hf-home",
        }
        command = [options.python or trainer_interpreter(), "-c", "import overhead; overhead.measure()"]
        done = subprocess.run(
            command, env=environment, input=json.dumps(task), stdout=subprocess.PIPE, text=True, check=True
        )
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def median_ratio(found: Mapping[str, list[dict[str, Any]]], variant: str) -> float:
    """Return the median over the pairs of a variant's time to that of plain TRL."""
    pairs = zip(found[variant], found[PLAIN], strict=True)
    return statistics.median(ours["seconds"] / plain["seconds"] for ours, plain in pairs)


def trainer_interpreter() -> str:
    """Return the interpreter of the trainer's environment."""
    posttrain = Path(sys.executable).with_name("posttrain")
    output = subprocess.run([posttrain, "env", "trainer"], stdout=subprocess.PIPE, text=True, check=True).stdout
    return str(output.splitlines()[-1])


# What follows runs in the trainer's environment.


def measure() -> None:
    """Do the runs named on standard input, and print what the timer of each wrote, by variant."""
    task = json.load(sys.stdin)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TQDM_DISABLE": "1",
    }
    script = importlib.import_module(task["script"])
    found: dict[str, list[dict[str, Any]]] = {}
    output, sys.stdout = sys.stdout, sys.stderr  # what the trainer prints is no result
    for number, (variant, addresses) in enumerate(task["runs"]):
        folder = Path(task["folder"]) / f"run-{number}"
        folder.mkdir()
        timed = time_run(script, folder, addresses, task)
        found.setdefault(variant, []).append(timed)
        subprocess.run(["rm", "-r", folder], check=True)
        print(f"{variant}: {timed['seconds']:.2f} s", file=sys.stderr, flush=True)
    print(json.dumps(found), file=output)


def time_run(script: Any, folder: Path, addresses: list[str] | None, task: Mapping[str, Any]) -> dict[str, Any]:
    """Train once, plainly or as a rank of a run, and return what the timer wrote."""
    import torch.distributed as dist

    timing = folder / "timing.json"
    config = script.build_config(
        steps=task["steps"],
        batch=task["batch"],
        checkpoints={"everySteps": task["every"], "keepLast": 2},
        code={"path": str(Path(__file__).parent)},
        callbacks=[{"function": "overhead:build_step_timer", "params": {"target": str(timing)}}],
    )
    environ = {
        **{key: value for key, value in os.environ.items() if not key.startswith("KUBEFLOW_")},
        "POSTTRAIN_STORAGE": str(folder / "storage"),
        "POSTTRAIN_RUNTIME": str(folder),
        "POSTTRAIN_MOUNT_FILES": "/",
    }
    (folder / "storage").mkdir()
    os.environ.pop("KUBEFLOW_TRAINER_SERVER_URL", None)
    if addresses is None:
        script.train_plainly(config, environ=environ)
        dist.destroy_process_group()
    else:
        token = folder / "token"
        token.write_text("secret")
        facts_url, status_url = addresses
        os.environ |= {"KUBEFLOW_TRAINER_SERVER_URL": status_url, "KUBEFLOW_TRAINER_SERVER_TOKEN": str(token)}
        train_as_rank(script, config, environ={**environ, "POSTTRAIN_FACTS_URL": facts_url})
    gc.collect()
    timed: dict[str, Any] = json.loads(timing.read_text())
    return timed


def train_as_rank(script: Any, config: Any, *, environ: Mapping[str, str]) -> None:
    """Train as rank 0 of a run."""
    from posttrain_workloads.rank import Rank
    from posttrain_workloads.reporting import open_reporter
    from posttrain_workloads.runtime import Runtime

    reporter = open_reporter(config, environ=environ, source="rank-0")
    script.train(
        Rank(
            config=config,
            environ=environ,
            storage=Path(environ["POSTTRAIN_STORAGE"]),
            runtime=Runtime.of(environ),
            rank=0,
            local_rank=0,
            reporter=reporter,
        )
    )
    reporter.close(timeout_seconds=1)


def build_step_timer(target: str) -> Any:
    """Return a callback that writes how long the steps after the first one took, and what was logged of each."""
    from transformers import TrainerCallback

    class StepTimer(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.started = 0.0
            self.seconds = 0.0
            self.logs: list[dict[str, Any]] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == state.max_steps:
                self.seconds = time.perf_counter() - self.started

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in (logs or {}):
                self.logs.append(dict(logs))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            Path(target).write_text(json.dumps({"seconds": self.seconds, "logs": self.logs}))

    return StepTimer()
