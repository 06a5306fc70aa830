"""What posttrain's rank costs a step of training against plain TRL: the parts that the benchmarks of all methods share.

It owns how runs of each variant are done in turn and timed; it must not know how a method trains: a script of its own
has `build_config` (the run), `train_plainly` (with TRL's own trainer) and `train` (the rank's).
"""

# ruff: noqa: ARG002 - the trainer hands every argument to every event

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INPUTS = ROOT / "examples" / "quickstart" / "inputs"
PLAIN = "plain"
REPORTING = "posttrain"
UNREACHABLE = "unreachable"
TURN_STEPS = 2
"""Steps that each side trains in turn: where the first writes a checkpoint, that is verified during the second."""


def parse_options(description: str | None, *, pairs: int, every: int, batch: int) -> argparse.Namespace:
    """Return what the command line asks for; the numbers are the defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=pairs, help="blocks of each variant")
    parser.add_argument("--every", type=int, default=every, help="steps of a block, which has one checkpoint")
    parser.add_argument("--batch", type=int, default=batch, help="rows of a step, or completions")
    parser.add_argument("--python", type=Path, help="the trainer's interpreter (default: `posttrain env trainer`)")
    options = parser.parse_args()
    if options.pairs < 2:
        parser.error("--pairs: take at least 2, as one ratio has no quartiles")
    if options.every % TURN_STEPS:
        parser.error(f"--every: take a multiple of {TURN_STEPS}, as so many steps are trained in turn")
    return options


@dataclass
class Timed:
    """What was seen of a variant: the seconds of its turns, and what was logged of each of its steps."""

    every: int
    turns: list[float] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def blocks(self) -> list[float]:
        """The seconds of the blocks: of as many turns as have one checkpoint."""
        return [sum(block) for block in zip(*[iter(self.turns)] * (self.every // TURN_STEPS), strict=True)]

    @property
    def step(self) -> float:
        """The median over the blocks of the seconds of a step."""
        return statistics.median(self.blocks) / self.every


def run_in_turn(
    script: str, variants: Sequence[str], options: argparse.Namespace, *, python_path: Sequence[Path] = ()
) -> dict[str, Timed]:
    """Train each variant in a process of its own, of which one at a time computes, for a turn; return what was seen.

    A turn with a checkpoint goes on until that counts, and what is written is on the disk before another begins; every
    order has its round. So all sides of a pair of blocks see the machine in the same minute.
    """
    sys.path.insert(0, str(ROOT))
    from tests.workloads._server import FactsServer
    from tests.workloads.conftest import ensure_quickstart_inputs

    ensure_quickstart_inputs()
    server = FactsServer()
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=64))
        addresses = {
            PLAIN: None,
            REPORTING: [server.url, server.status_url],
            UNREACHABLE: [f"http://127.0.0.1:{silent.getsockname()[1]}/{path}" for path in ("facts", "status")],
        }
        processes = {}
        for variant in variants:
            task = {
                "folder": stack.enter_context(tempfile.TemporaryDirectory()),
                "script": script,
                "addresses": addresses[variant],
                **{name: getattr(options, name) for name in ("pairs", "every", "batch")},
            }
            process = _start(task, python=options.python, python_path=python_path)
            processes[variant] = stack.enter_context(process)
            stack.callback(process.kill)  # who was interrupted does not wait for a block that nobody asks for
        timed = {variant: Timed(options.every) for variant in variants}
        for variant, process in processes.items():
            _read(variant, process)
        orders = itertools.cycle(itertools.permutations(variants))
        for order in itertools.islice(orders, options.pairs * options.every // TURN_STEPS):
            for variant in order:
                timed[variant].turns.append(_take_turn(variant, processes[variant]))
            print(", ".join(f"{name}: {seen.turns[-1]:.2f} s" for name, seen in timed.items()), file=sys.stderr)
        for variant, process in processes.items():
            timed[variant].logs = _take_turn(variant, process)
    return timed


def _start(task: Mapping[str, Any], *, python: Path | None, python_path: Sequence[Path]) -> subprocess.Popen[str]:
    parts = [*(ROOT / part for part in ("benchmarks", "operator", "workloads", ".")), *python_path]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, parts)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": f"{task['folder']}/hf-home",
    }
    return subprocess.Popen(
        [python or trainer_interpreter(), "-c", "import overhead; overhead.measure()", json.dumps(task)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _take_turn(variant: str, process: subprocess.Popen[str]) -> Any:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return _read(variant, process)


def _read(variant: str, process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"the run of {variant} ended before its last block; what it wrote is above")
    return json.loads(line)


def median_ratio(timed: Mapping[str, Timed], variant: str) -> float:
    """Return the median over the pairs of a variant's time to that of plain TRL."""
    return statistics.median(_ratios(timed, variant))


def quartiles(timed: Mapping[str, Timed], variant: str) -> str:
    """Return the middle half of those ratios, as text: what the median is worth."""
    low, _, high = statistics.quantiles(_ratios(timed, variant))
    return f"{low:.3f} to {high:.3f}"


def _ratios(timed: Mapping[str, Timed], variant: str) -> list[float]:
    return [ours / plain for ours, plain in zip(timed[variant].blocks, timed[PLAIN].blocks, strict=True)]


def trainer_interpreter() -> str:
    """Return the interpreter of the trainer's environment."""
    posttrain = Path(sys.executable).with_name("posttrain")
    output = subprocess.run([posttrain, "env", "trainer"], stdout=subprocess.PIPE, text=True, check=True).stdout
    return str(output.splitlines()[-1])


# What follows runs in the trainer's environment.


def measure() -> None:
    """Do the run that the first argument describes, turn by turn as standard input says, and print what was seen."""
    import torch.distributed as dist

    task = json.loads(sys.argv[1])
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
    output, sys.stdout = sys.stdout, sys.stderr  # what the trainer prints is no result
    folder, every = Path(task["folder"]), task["every"]
    timer = {"every": every, "output": output.fileno(), "storage": None}
    if task["addresses"] is not None:
        timer["storage"] = str(folder / "storage")
    config = script.build_config(
        steps=1 + task["pairs"] * every + 1,
        batch=task["batch"],
        checkpoints={"everySteps": every, "keepLast": 2},
        code={"path": str(Path(__file__).parent)},
        callbacks=[{"function": "overhead:build_step_timer", "params": timer}],
    )
    environ = {
        **{key: value for key, value in os.environ.items() if not key.startswith("KUBEFLOW_")},
        "POSTTRAIN_STORAGE": str(folder / "storage"),
        "POSTTRAIN_RUNTIME": str(folder),
        "POSTTRAIN_MOUNT_FILES": "/",
    }
    (folder / "storage").mkdir()
    if task["addresses"] is None:
        script.train_plainly(config, environ=environ)
        dist.destroy_process_group()
    else:
        token = folder / "token"
        token.write_text("secret")
        facts_url, status_url = task["addresses"]
        os.environ |= {"KUBEFLOW_TRAINER_SERVER_URL": status_url, "KUBEFLOW_TRAINER_SERVER_TOKEN": str(token)}
        train_as_rank(script, config, environ={**environ, "POSTTRAIN_FACTS_URL": facts_url})


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


def build_step_timer(every: int, output: int, storage: str | None) -> Any:
    """Return a callback that trains a turn each time that standard input says so, and writes how long that took.

    The first step warms up. The last one is not timed either, as a run writes a checkpoint when it ends. With a
    `storage`, a turn whose first step wrote one ends when it is marked there.
    """
    from transformers import TrainerCallback

    from posttrain.contract.checkpoints import MARKER_NAME, checkpoint_folder

    def write(value: Any) -> None:
        os.write(output, f"{json.dumps(value)}\n".encode())

    class StepTimer(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.started = 0.0
            self.logs: list[dict[str, Any]] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ended = state.global_step - TURN_STEPS  # before the turn
            if ended % TURN_STEPS == 0:
                return
            if storage is not None and (ended + 1) % every == 0 and ended > 0:
                marker = Path(storage) / checkpoint_folder(ended + 1) / MARKER_NAME
                while not marker.exists():
                    time.sleep(0.01)
            seconds = time.perf_counter() - self.started
            os.sync()  # or what this turn left for later would be written during the next one, which is another's
            write(seconds)
            if not sys.stdin.readline():
                raise SystemExit("nobody asks for another turn")
            self.started = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in (logs or {}):
                self.logs.append(dict(logs))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            write(self.logs)

    return StepTimer()
