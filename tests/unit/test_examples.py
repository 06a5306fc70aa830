"""The examples are resources that work: each is valid, can be planned, and needs nothing that the image lacks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest

from posttrain.api.conditions import find_condition
from posttrain.api.loader import load_documents
from posttrain.api.reasons import REASONS
from posttrain.api.training_run import TrainingRun
from posttrain.api.validate import parse_training_run
from posttrain.plan.training_run import plan_training_run, preview_training_run
from posttrain.plan.types import Observed
from posttrain.settings import Settings
from posttrain_workloads.packages import implied_packages
from tests.support.builders import T0

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "open-r1").glob("*.yaml"))
QUICKSTART, IN_CLUSTER, BY_REWARD = (
    ROOT / "examples" / "quickstart" / name for name in ("trainingrun.yaml", "cluster.yaml", "grpo.yaml")
)
EXAMPLES = [*RECIPES, QUICKSTART, IN_CLUSTER, BY_REWARD]
PLANNED = [*RECIPES, IN_CLUSTER]


def load(path: Path) -> TrainingRun:
    (document,) = load_documents(path.read_text(encoding="utf-8"), origin=path.name)
    return parse_training_run(document.data, origin=path.name, line_of=document.line_of)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_valid(path: Path) -> None:
    assert load(path).spec.training.args


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_an_example_for_a_cluster_is_accepted_and_planned_to_its_gang(path: Path) -> None:
    run = load(path)
    name = run.metadata.name
    plan = plan_training_run(run, Observed(), now=T0, settings=Settings())
    assert plan.status is not None
    accepted = find_condition(plan.status.conditions, "Accepted")
    assert accepted is not None
    assert (accepted.status, accepted.message) == ("True", REASONS["Accepted"].message)

    objects = {
        (manifest["kind"], manifest["metadata"]["name"]): manifest
        for manifest in preview_training_run(run, now=T0, settings=Settings())
    }
    assert ("Job", f"{name}-prepare") in objects
    replicas = objects["PyTorchJob", f"{name}-a1"]["spec"]["pytorchReplicaSpecs"].values()
    assert sum(replica["replicas"] for replica in replicas) == run.spec.resources.num_nodes
    config_map = objects["ConfigMap", f"{name}-a1"]["data"]
    gang = json.loads(config_map["config.json"])["gang"]
    assert gang["num_nodes"] * gang["processes_per_node"] == run.spec.resources.world_size
    assert ("deepspeed.json" in config_map) == run.spec.parallelism.strategy.startswith("ZeRO")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_image_has_every_package_that_an_example_implies(path: Path) -> None:
    run = load(path)
    locked = set(
        re.findall(r"^([A-Za-z0-9._-]+)==", (ROOT / "images/trainer/requirements.txt").read_text(), re.MULTILINE)
    )

    needed = {package.distribution for package in implied_packages(run.spec, run.spec.training.args)}

    assert needed <= locked
    assert ("deepspeed" in needed) == run.spec.parallelism.strategy.startswith("ZeRO")


def test_the_quickstart_in_a_cluster_is_the_quickstart_with_claims_and_fewer_steps() -> None:
    alone, in_cluster = load(QUICKSTART), load(IN_CLUSTER)
    (train,), (held_out,) = in_cluster.spec.datasets, in_cluster.spec.eval_datasets

    assert (in_cluster.spec.model.source, train.source, held_out.source) == (
        "pvc://inputs/model",
        "pvc://inputs/train.jsonl",
        "pvc://inputs/heldout.jsonl",
    )
    assert in_cluster.spec.model.chat_template == alone.spec.model.chat_template
    ours, theirs = in_cluster.spec.training.args, alone.spec.training.args
    assert ours.keys() == theirs.keys()
    # Two ranks of half the batch: a step is made of as many rows.
    assert {key for key in ours if ours[key] != theirs[key]} == {
        "max_steps",
        "per_device_train_batch_size",
        "eval_steps",
    }
    assert (
        ours["per_device_train_batch_size"] * in_cluster.spec.resources.world_size
        == theirs["per_device_train_batch_size"] * alone.spec.resources.world_size
    )


def test_the_list_of_recipes_is_complete() -> None:
    text = (ROOT / "examples" / "open-r1" / "README.md").read_text(encoding="utf-8")

    assert sorted(re.findall(r"\]\(([^)]+\.yaml)\)", text)) == [path.name for path in RECIPES]


@pytest.mark.parametrize(
    ("name", "batch", "length"),
    [
        ("openr1-distill-7b", 128, 32768),
        ("olympiccoder-7b", 128, 32768),
        ("olympiccoder-32b", 128, 22528),
        ("openr1-qwen-7b", 16, 32768),
        ("qwen2.5-1.5b-openr1-math", 128, 16384),
        ("qwen2.5-1.5b-bespoke-stratos", 128, 4096),
        ("smollm2-1.7b", 64, 8192),
        ("smollm2-1.7b-instruct", 64, 8192),
        ("mistral-small-24b", 128, 32768),
    ],
)
def test_the_global_batch_is_the_recipes(name: str, batch: int, length: int) -> None:
    run = load(ROOT / "examples" / "open-r1" / f"{name}.yaml")
    args: dict[str, Any] = run.spec.training.args

    rows = args["per_device_train_batch_size"] * args.get("gradient_accumulation_steps", 1)
    assert rows * run.spec.resources.world_size == batch
    assert args["max_length"] == length
    text = (ROOT / "examples" / "open-r1" / f"{name}.yaml").read_text(encoding="utf-8")
    assert re.search(rf"Global batch: .* = {batch}\b", text)


def test_a_chat_template_of_an_example_renders_a_conversation() -> None:
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    rendered = {
        path.stem: jinja2.Template(template).render(messages=messages, add_generation_prompt=True)
        for path in RECIPES
        if (template := load(path).spec.model.chat_template)
    }

    turns = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n<|im_start|>assistant\n"
    assert rendered["smollm2-1.7b"] == turns
    assert rendered["openr1-distill-7b"].startswith("<|im_start|>system\n")
    assert rendered["openr1-distill-7b"].endswith(f"<|im_end|>\n{turns}")
    assert rendered.keys() == {"smollm2-1.7b", "openr1-distill-7b"}
