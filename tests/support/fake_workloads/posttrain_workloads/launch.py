"""A container that reports as the real one does, in a second: prepare checks a word, the trainer counts steps.

FAKE=<behaviour> in the spec's podOverrides.env changes what the trainer does at step 3 of its first attempt:
`fail` exits with 1, `die` kills itself, `deaf` does not obey SIGTERM, `slow` takes its time from then on.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

from posttrain.contract.config import TrainingConfig
from posttrain.contract.facts import (
    CheckpointSaved,
    Fact,
    FactBody,
    FactsReport,
    Logged,
    PrepareResult,
    ResultFact,
    Started,
)
from posttrain.contract.result import Result, to_termination_message

STEP_SECONDS = 0.02
SLOW_SECONDS = 0.2

config = TrainingConfig.from_json(Path(os.environ["POSTTRAIN_CONFIG"]).read_text())
storage = Path(os.environ["POSTTRAIN_STORAGE"])
termination = Path(os.environ["POSTTRAIN_TERMINATION"])
token = Path(os.environ["KUBEFLOW_TRAINER_SERVER_TOKEN"]).read_text()
numbers = itertools.count(1)


def tell(source: str, *bodies: FactBody) -> None:
    """Send facts."""
    now = datetime.now(UTC)
    facts = [Fact(attempt=config.attempt, source=source, seq=next(numbers), time=now, body=body) for body in bodies]
    report = FactsReport(attempt=config.attempt, source=source, facts=tuple(facts))
    request = urllib.request.Request(
        os.environ["POSTTRAIN_FACTS_URL"],
        data=report.model_dump_json().encode(),
        headers={"Authorization": f"Bearer {token}"},
    )
    with urllib.request.urlopen(request, timeout=10) as reply:
        assert json.load(reply)["acknowledged"], "nothing was acknowledged"


def end(source: str, result: Result, *, code: int, step: int | None = None) -> None:
    """Leave with a result."""
    termination.write_text(to_termination_message(result))
    tell(source, ResultFact(result=result, last_step=step))
    sys.exit(code)


def prepare() -> None:
    """Refuse a prompt that says so."""
    if config.spec.system_prompt == "wrong":
        tell("prepare", PrepareResult(problems=("DatasetColumnMissing: the prompt is wrong: mend it",)))
        end("prepare", Result(reason="PrepareFailed", message="the prompt is wrong: mend it"), code=2)
    tell("prepare", PrepareResult())
    end("prepare", Result(reason="Completed", message="prepared"), code=0)


def train() -> None:
    """Count to max_steps, from where the storage says."""
    behaviour = os.environ.get("FAKE", "")
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour == "deaf" else lambda number, _: stopping.append(number))
    kept = storage / "step"
    first = int(kept.read_text()) if kept.exists() else 0
    last = int(str(config.args["max_steps"]))
    tell("rank-0", Started(world_size=config.gang.world_size, max_steps=last, resumed_from_step=first))
    for step in range(first + 1, last + 1):
        print(f"step {step}", flush=True)
        slow = step > 3 and behaviour in {"slow", "deaf"}
        time.sleep(SLOW_SECONDS if slow else STEP_SECONDS)
        tell("rank-0", Logged(step=step, metrics={"loss": str(1 / step)}))
        if step % 2 == 0 or stopping:
            kept.write_text(str(step))
            uri = f"pvc://{config.run.name}/{config.run.name}/checkpoint-{step}"
            tell("rank-0", CheckpointSaved(step=step, uri=uri, bytes=1, digest=f"sha256:{step}"))
        if stopping:
            end("rank-0", Result(reason="Terminated", message="told to stop"), code=143, step=step)
        if step == 3 and config.attempt == 1 and behaviour == "fail":
            end("rank-0", Result(reason="TrainingFailed", message="the loss is blue"), code=1, step=step)
        if step == 3 and config.attempt == 1 and behaviour == "die":
            os.kill(os.getpid(), signal.SIGKILL)
    artifacts = {"model": f"pvc://{config.run.name}/{config.run.name}/model"}
    end("rank-0", Result(reason="Completed", message=f"{last} steps are done", artifacts=artifacts), code=0, step=last)


prepare() if sys.argv[1] == "prepare" else train()
