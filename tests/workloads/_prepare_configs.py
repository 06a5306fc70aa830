"""Specs and cases for tests of prepare and of data, and the one process that runs all of a script's cases."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.api.args import coerce_args, load_table
from posttrain.api.training_run import TrainingRunSpec
from posttrain.contract.config import GangShape, RunIdentity, TrainingConfig, config_hash
from posttrain.plan.sources import named_sources, resolve_source

ROOT = Path(__file__).resolve().parents[2]

CONVERSATIONS = [
    {
        "messages": [
            {"role": "user", "content": f"How much is {a} + {b}?"},
            {"role": "assistant", "content": f"{a} + {b} = {a + b}"},
        ]
    }
    for a in range(5)
    for b in range(4)
]


def write_jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines; return the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def build_case_config(
    *, model: str, datasets: Sequence[Mapping[str, Any]], args: Mapping[str, Any] | None = None, **more: Any
) -> TrainingConfig:
    """Return a config with the given members; `gpu_memory` and further fields of the spec as keywords."""
    gpu_memory = more.pop("gpu_memory", None)
    trainer_class = more.pop("trainer_class", None)
    model_fields = more.pop("model_fields", {})
    coerced = coerce_args({"max_steps": 2, "max_length": 64, **(args or {})}, load_table("sft_config"))
    sft = {"args": coerced, **({"trainerClass": trainer_class} if trainer_class else {})}
    spec = TrainingRunSpec.model_validate(
        {
            "model": {"source": model, **model_fields},
            "datasets": list(datasets),
            "sft": sft,
            "resources": {"gpusPerNode": 0},
            **more,
        }
    )
    resolved = {named.key: resolve_source(named.source, revision=named.revision) for named in named_sources(spec)}
    return TrainingConfig(
        run=RunIdentity(kind="TrainingRun", namespace="default", name="case"),
        attempt=0,
        method="sft",
        config_hash=config_hash(spec),
        spec=spec,
        args=coerced,
        model=resolved["model"],
        datasets=tuple(resolved[f"datasets/{i}"] for i in range(len(spec.datasets))),
        eval_datasets=tuple(resolved[f"evalDatasets/{i}"] for i in range(len(spec.eval_datasets))),
        gang=GangShape(
            num_nodes=spec.resources.num_nodes,
            processes_per_node=spec.resources.ranks_per_node,
            gpus_per_node=spec.resources.gpus_per_node,
        ),
        gpu_memory_bytes=gpu_memory,
        gpu_name="H100" if gpu_memory else None,
    )


def run_cases(
    cases: Sequence[Mapping[str, Any]], *, python: Path, folder: Path, environ: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run all cases in one process; return what each found, by its name."""
    storage = folder / "storage"
    storage.mkdir(parents=True)
    listed = [
        {
            **case,
            "what": case.get("what", "prepare"),
            "storage": str(storage),
            "config": json.loads(case["config"].to_json()),
        }
        for case in cases
    ]
    return run_script(
        "prepare_cases.py", listed, python=python, folder=folder, environ=environ or {"HF_HUB_OFFLINE": "1"}
    )


def run_script(name: str, asked: Any, *, python: Path, folder: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """Run a script that lies here on what it is asked; return what it found."""
    (folder / "cases.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [python, Path(__file__).with_name(name), folder / "cases.json", folder / "out.json"],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "HF_HOME": str(folder / "hf-home"),
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("operator", "workloads")),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **environ,
        },
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    answers: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return answers
