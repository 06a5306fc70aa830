"""What reporting and verified checkpoints cost a step of SFT, against plain TRL with the same settings.

    .venv/bin/python benchmarks/sft_overhead.py [--pairs 3] [--steps 12] [--every 6] [--batch 4]

Runs of the quickstart's real model on one CPU thread, in turn: plain TRL, posttrain's rank with a progress server, and
the same with a server that takes connections and never answers. The time is from the second step's begin to the last
step's end, with a checkpoint of 1.6 GB between them, which is many times denser than in a run that matters; the ratio
is the median over the pairs.
"""

# ruff: noqa: ARG002 - the trainer hands every argument to every event

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INPUTS = ROOT / "examples" / "quickstart" / "inputs"
VARIANTS = ("plain", "posttrain", "unreachable")


def main() -> None:
    """Measure, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=6, help="steps between checkpoints")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--python", type=Path, help="the trainer's interpreter (default: `posttrain env trainer`)")
    options = parser.parse_args()

    sys.path.insert(0, str(ROOT))
    from tests.workloads._server import FactsServer

    server = FactsServer()
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent, tempfile.TemporaryDirectory() as folder:
        addresses = {
            "plain": None,
            "posttrain": [server.url, server.status_url],
            "unreachable": [f"http://127.0.0.1:{silent.getsockname()[1]}/{path}" for path in ("facts", "status")],
        }
        task = {
            "folder": folder,
            "runs": [(variant, addresses[variant]) for _ in range(options.pairs) for variant in VARIANTS],
            "steps": options.steps,
            "every": options.every,
            "batch": options.batch,
        }
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("benchmarks", "operator", "workloads", ".")),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": f"{folder}/hf-home",
        }
        command = [options.python or trainer_interpreter(), "-c", "import sft_overhead; sft_overhead.measure()"]
        done = subprocess.run(
            command, env=environment, input=json.dumps(task), stdout=subprocess.PIPE, text=True, check=True
        )
    times: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    ratios = {
        variant: statistics.median(ours / plain for ours, plain in zip(times[variant], times["plain"], strict=True))
        for variant in VARIANTS[1:]
    }
    step = statistics.median(times["plain"]) / (options.steps - 1)
    print(
        f"SFT step with reporting and verified checkpoints against plain TRL: {ratios['posttrain']:.3f}x, with an "
        f"unreachable progress server {ratios['unreachable']:.3f}x (median of {options.pairs} pairs, {options.steps} "
        f"steps of {step:.2f} s, a checkpoint every {options.every})"
    )


def trainer_interpreter() -> str:
    """Return the interpreter of the trainer's environment."""
    posttrain = Path(sys.executable).with_name("posttrain")
    output = subprocess.run([posttrain, "env", "trainer"], stdout=subprocess.PIPE, text=True, check=True).stdout
    return str(output.splitlines()[-1])


# What follows runs in the trainer's environment.


def measure() -> None:
    """Do the runs named on standard input, and print the times of each variant."""
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
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    output, sys.stdout = sys.stdout, sys.stderr  # what the trainer prints is no result
    for number, (variant, addresses) in enumerate(task["runs"]):
        folder = Path(task["folder"]) / f"run-{number}"
        folder.mkdir()
        times[variant].append(time_run(folder, addresses, task))
        subprocess.run(["rm", "-r", folder], check=True)
        print(f"{variant}: {times[variant][-1]:.2f} s", file=sys.stderr, flush=True)
    print(json.dumps(times), file=output)


def time_run(folder: Path, addresses: list[str] | None, task: Mapping[str, Any]) -> float:
    """Train once, plainly or as a rank of a run, and return the seconds that the steps took."""
    from tests.workloads._configs import build_config

    timing = folder / "timing.json"
    config = build_config(
        model=INPUTS / "model",
        rows=INPUTS / "train.jsonl",
        args={"max_steps": task["steps"], "per_device_train_batch_size": task["batch"], "learning_rate": 1e-5},
        checkpoints={"everySteps": task["every"], "keepLast": 2},
        code={"path": str(Path(__file__).parent)},
        callbacks=[{"function": "sft_overhead:build_step_timer", "params": {"target": str(timing)}}],
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
        train_plainly(config, environ=environ)
    else:
        token = folder / "token"
        token.write_text("secret")
        facts_url, status_url = addresses
        os.environ |= {"KUBEFLOW_TRAINER_SERVER_URL": status_url, "KUBEFLOW_TRAINER_SERVER_TOKEN": str(token)}
        train_as_rank(config, environ={**environ, "POSTTRAIN_FACTS_URL": facts_url})
    gc.collect()
    seconds: float = json.loads(timing.read_text())
    return seconds


def train_plainly(config: Any, *, environ: Mapping[str, str]) -> None:
    """Train with TRL's own trainer, its own checkpoints and their own rotation."""
    import torch.distributed as dist
    from trl import SFTConfig, SFTTrainer

    from posttrain_workloads.arguments import training_args
    from posttrain_workloads.data import load_mixture
    from posttrain_workloads.formats import shape_for_sft
    from posttrain_workloads.model import load_model, load_tokenizer
    from posttrain_workloads.owncode import build_callbacks

    args = SFTConfig(**{**training_args(config, environ=environ), "save_total_limit": 2})
    trainer = SFTTrainer(
        model=load_model(config, environ=environ),
        args=args,
        train_dataset=load_mixture(config, shape=partial(shape_for_sft, config), environ=environ).train,
        processing_class=load_tokenizer(config, environ=environ),
        callbacks=build_callbacks(config),
    )
    trainer.train()
    dist.destroy_process_group()


def train_as_rank(config: Any, *, environ: Mapping[str, str]) -> None:
    """Train as rank 0 of a run."""
    from posttrain_workloads.rank import Rank
    from posttrain_workloads.reporting import open_reporter
    from posttrain_workloads.runtime import Runtime
    from posttrain_workloads.sft import train

    reporter = open_reporter(config, environ=environ, source="rank-0")
    train(
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
    """Return a callback that writes how long the steps after the first one took."""
    from transformers import TrainerCallback

    class StepTimer(TrainerCallback):  # type: ignore[misc]
        started = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == state.max_steps:
                Path(target).write_text(json.dumps(time.perf_counter() - self.started))

    return StepTimer()


if __name__ == "__main__":
    main()
