"""A run as it lies on disk after its end: the resource with its status, and its storage folder."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

from posttrain.api.training_run import TrainingRun
from posttrain.contract.facts import (
    CheckpointSaved,
    Fact,
    FactBody,
    FirstError,
    Logged,
    PhaseChanged,
    PrepareResult,
    ResultFact,
    Started,
)
from posttrain.contract.result import Result

START = datetime(2026, 3, 14, 9, 26, 53, tzinfo=UTC)


def build_recorded_run(
    name: str = "stratos-demo",
    *,
    stage: str = "Succeeded",
    learning_rate: float = 4e-5,
    failure: dict[str, Any] | None = None,
) -> TrainingRun:
    """Return a finished run of 400 steps that was restarted once."""
    end = START + timedelta(minutes=51, seconds=12)
    return TrainingRun.model_validate_json(
        json.dumps(
            {
                "apiVersion": "posttrain.dev/v1alpha1",
                "kind": "TrainingRun",
                "metadata": {"name": name, "creationTimestamp": START.isoformat()},
                "spec": {
                    "model": {"source": "Qwen/Qwen2.5-1.5B-Instruct"},
                    "datasets": [{"source": "HuggingFaceH4/Bespoke-Stratos-17k"}],
                    "testFraction": "0.05",
                    "sft": {"args": {"learning_rate": learning_rate, "packing": True, "max_steps": 400}},
                    "parallelism": {"strategy": "ZeRO3"},
                    "resources": {"gpusPerNode": 2},
                },
                "status": {
                    "stage": stage,
                    "attempt": 2,
                    "startTime": START.isoformat(),
                    "completionTime": end.isoformat(),
                    "progress": {
                        "step": 400,
                        "maxSteps": 400,
                        "percentage": 100,
                        "metrics": [{"name": "loss", "value": "0.61"}, {"name": "learning_rate", "value": "1e-8"}],
                        "history": [{"step": 5, "loss": "1.41"}, {"step": 400, "loss": "0.61"}],
                    },
                    "restarts": {"infrastructure": 1, "application": 0, "stepsLost": 35},
                    "checkpoints": {"latestStep": 400, "latestURI": "pvc://stratos-demo/stratos-demo/checkpoint-400"},
                    "model": {"uri": "pvc://stratos-demo/stratos-demo/model"},
                    "provenance": {
                        "configHash": "sha256:6c1f0e0a7f3f4f6d9a52a6df8a3d4f1be7c0b1f2a3948576a0b1c2d3e4f50617",
                        "modelCommit": "989aa7980e4cf806f80c7fef2b1adb7bc71aa306",
                        "datasetCommits": {"datasets/0": "9e9c6b1e6f2c4a6f8a2d8f0f3a1b5c7d9e1f3a5b"},
                        "imageDigests": {
                            "trainer": "sha256:0f4d7a3c5b6e8d9f0a1b2c3d4e5f60718293a4b5c6d7e8f901234567890abcde"
                        },
                        "seed": 42,
                        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0"},
                    },
                    "failure": failure
                    or {
                        "reason": "RankKilled",
                        "message": "rank 1 was ended by SIGKILL at step 235",
                        "rank": 1,
                        "exitCode": 138,
                        "advice": "Usually the node's or the administrator's doing.",
                    },
                },
            }
        )
    )


def write_recorded_storage(storage: Path, *, learning_rate: float = 4e-5, seed: int = 7, floor: float = 0.58) -> None:
    """Write what the run above leaves behind in its storage."""
    storage.mkdir(parents=True, exist_ok=True)
    history = list(_history(learning_rate=learning_rate, seed=seed, floor=floor))
    (storage / "trainer_state.json").write_text(json.dumps({"global_step": 400, "log_history": history}))
    (storage / "facts.jsonl").write_text("".join(fact.model_dump_json() + "\n" for fact in _facts(history)))
    (storage / "samples.json").write_text(json.dumps(_SAMPLES))
    (storage / "effective_args.json").write_text(
        json.dumps(
            {
                "learning_rate": learning_rate,
                "packing": True,
                "max_steps": 400,
                "bf16": True,
                "save_steps": 50,
                "logging_nan_inf_filter": False,
                "gradient_checkpointing": True,
                "seed": 42,
            }
        )
    )


def _history(*, learning_rate: float, seed: int, floor: float) -> Iterator[dict[str, float]]:
    noise = random.Random(seed)
    for step in range(5, 401, 5):
        warm = min(step / 40, 1.0)
        loss = floor + 0.86 * math.exp(-step / 70) + noise.gauss(0, 0.022)
        yield {
            "step": step,
            "epoch": step / 200,
            "loss": round(loss, 4),
            "grad_norm": round(0.7 + 1.9 * math.exp(-step / 30) + abs(noise.gauss(0, 0.12)), 4),
            "learning_rate": learning_rate * (warm if warm < 1 else 0.5 * (1 + math.cos(math.pi * (step - 40) / 360))),
            "num_tokens": step * 65536,
            "mean_token_accuracy": round(0.86 - 0.2 * math.exp(-step / 80) + noise.gauss(0, 0.004), 4),
        }
        if step % 50 == 0:
            yield {
                "step": step,
                "epoch": step / 200,
                "eval_loss": round(floor + 0.05 + 0.8 * math.exp(-step / 80), 4),
                "eval_mean_token_accuracy": round(0.85 - 0.19 * math.exp(-step / 90), 4),
                "eval_runtime": 11.2,
            }
    yield {"step": 400, "epoch": 2.0, "train_loss": 0.71, "train_runtime": 1900.0}


def _facts(history: list[dict[str, float]]) -> Iterator[Fact]:
    versions = {"torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0"}
    logged = [entry for entry in history if "loss" in entry]
    yield _fact(
        40,
        PrepareResult(
            warnings=("datasets[0]: 212 of 16710 rows are longer than max_length 4096 and are cut",),
            commits={"model": "989aa7980e4cf806f80c7fef2b1adb7bc71aa306"},
            estimates={"memory per GPU": "21.4 GiB of 80 GiB", "steps": "400", "tokens per step": "65,536"},
        ),
        attempt=0,
        source="prepare",
        seq=1,
    )
    seq = iter(range(1, 10_000))
    yield _fact(95, Started(world_size=2, max_steps=400, resumed_from_step=0, versions=versions), seq=next(seq))
    yield _fact(95, PhaseChanged(phase="training", step=0), seq=next(seq))
    for entry in logged:
        if entry["step"] <= 235:
            yield from _steps(entry, at=100 + 6.1 * entry["step"] + 2 * math.sin(entry["step"]), attempt=1, seq=seq)
    lost = FirstError(
        rank=1,
        time=START + timedelta(seconds=1540),
        reason="RankKilled",
        message="rank 1 was ended by SIGKILL at step 235",
    )
    yield _fact(1541, lost, source="launch-0", seq=1)
    yield _fact(
        1545, ResultFact(result=Result(reason="RankKilled", message=lost.message, rank=1)), source="launch-0", seq=2
    )
    seq = iter(range(1, 10_000))
    resumed = Started(world_size=2, max_steps=400, resumed_from_step=200, versions=versions)
    yield _fact(1600, resumed, attempt=2, seq=next(seq))
    for entry in logged:
        if entry["step"] > 200:
            yield from _steps(
                entry, at=1605 + 6.0 * (entry["step"] - 200) + 2 * math.sin(entry["step"]), attempt=2, seq=seq
            )
    yield _fact(
        3072,
        ResultFact(result=Result(reason="Completed", message="400 steps"), last_step=400),
        attempt=2,
        source="launch-0",
        seq=1,
    )


def _steps(entry: dict[str, float], *, at: float, attempt: int, seq: Iterator[int]) -> Iterator[Fact]:
    step = int(entry["step"])
    numbers = {name: str(value) for name, value in entry.items() if name != "step"}
    yield _fact(at, Logged(step=step, metrics=numbers), attempt=attempt, seq=next(seq))
    if step % 50 == 0:
        saved = CheckpointSaved(
            step=step,
            uri=f"checkpoint-{step}",
            bytes=9_263_000_000,
            digest="sha256:" + sha256(str(step).encode()).hexdigest(),
        )
        yield _fact(at + 9, saved, attempt=attempt, seq=next(seq))


def _fact(seconds: float, body: FactBody, *, attempt: int = 1, source: str = "rank-0", seq: int) -> Fact:
    return Fact(attempt=attempt, source=source, seq=seq, time=START + timedelta(seconds=seconds), body=body)


_SAMPLES = [
    {
        "tokens": 61,
        "trained_tokens": 34,
        "tokens_cut": 0,
        "segments": [
            {
                "text": "<|im_start|>system\nYou are a careful mathematician.<|im_end|>\n<|im_start|>user\n"
                "What is the sum of the first 12 odd numbers?<|im_end|>\n<|im_start|>assistant\n",
                "trained": False,
            },
            {
                "text": "The sum of the first n odd numbers is n².\nFor n = 12 that is 12² = 144.\n\n"
                "The answer is 144.<|im_end|>",
                "trained": True,
            },
            {"text": "\n", "trained": False},
        ],
    },
    {
        "tokens": 40,
        "trained_tokens": 17,
        "tokens_cut": 12,
        "segments": [
            {"text": "<|im_start|>user\nIs 91 < 7 * 13?<|im_end|>\n<|im_start|>assistant\n", "trained": False},
            {"text": "No: 7 * 13 = 91, so they are equal.<|im_end|>", "trained": True},
        ],
    },
]
