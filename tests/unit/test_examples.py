"""The examples are resources that work: each is valid, can be planned, and needs nothing that the image lacks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest

from posttrain.api.conditions import find_condition
from posttrain.api.grpo_checks import count_groups
from posttrain.api.loader import load_documents
from posttrain.api.reasons import REASONS
from posttrain.api.training_run import TrainingRun
from posttrain.api.validate import parse_training_run
from posttrain.convert import convert_recipe
from posttrain.files import check_run
from posttrain.local.preflight import resolve_paths
from posttrain.plan.training_run import plan_training_run, preview_training_run
from posttrain.plan.types import Observed
from posttrain.settings import Settings
from posttrain_workloads.packages import implied_packages
from posttrain_workloads.rewards import build
from tests.support.builders import T0

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "open-r1").glob("*.yaml"))
QUICKSTART, IN_CLUSTER, BY_REWARD, IN_TURN, IN_TURNS = (
    ROOT / "examples" / "quickstart" / name
    for name in ("trainingrun.yaml", "cluster.yaml", "grpo.yaml", "sft-then-grpo.yaml", "turns.yaml")
)
EXAMPLES = [*RECIPES, QUICKSTART, IN_CLUSTER, BY_REWARD, IN_TURNS]
PLANNED = [*RECIPES, IN_CLUSTER]


def load(path: Path) -> TrainingRun:
    (document,) = load_documents(path.read_text(encoding="utf-8"), origin=path.name)
    return parse_training_run(document.data, origin=path.name, line_of=document.line_of)


def test_the_second_of_two_runs_in_a_file_starts_from_the_model_of_the_first() -> None:
    documents = load_documents(IN_TURN.read_text(encoding="utf-8"), origin=IN_TURN.name)
    first, second = (
        check_run(document, data=resolve_paths(document.data, folder=IN_TURN.parent)) for document in documents
    )

    planned = preview_training_run(second, now=T0, settings=Settings(allow_file_sources=True), beside=[first])
    (config,) = (
        manifest["data"]
        for manifest in planned
        if manifest["metadata"]["name"] == "sums-grpo-a1" and manifest["kind"] == "ConfigMap"
    )
    assert json.loads(config["config.json"])["model"]["path"] == f"{first.metadata.name}/model"


REWARDED = [path for path in RECIPES if load(path).spec.grpo is not None]


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
    lock = ROOT / "images" / run.spec.image_name / "requirements.txt"
    locked = set(re.findall(r"^([A-Za-z0-9._-]+)==", lock.read_text(), re.MULTILINE))

    needed = {package.distribution for package in implied_packages(run.spec, run.spec.training.args)}

    assert needed <= locked
    assert ("deepspeed" in needed) == run.spec.parallelism.strategy.startswith("ZeRO")
    assert ("math-verify" in needed) == (path in REWARDED and run.spec.used_sandbox is None)


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


@pytest.mark.parametrize(
    ("name", "completions", "prompts", "length"),
    [
        ("qwen2.5-1.5b-grpo", 512, 32, 1024),
        ("deepseek-r1-distill-qwen-1.5b-grpo", 512, 32, 2048),
        ("deepseek-r1-distill-qwen-7b-grpo", 1792, 256, 1024),
        ("qwen2.5-7b-grpo", 512, 32, 4096),
        ("qwen2.5-math-7b-simple-rl", 896, 128, 1024),
        ("qwen2.5-1.5b-code-grpo", 448, 32, 2048),
        ("qwen2.5-1.5b-ioi-grpo", 448, 32, 2048),
        ("qwen2.5-coder-7b-codeforces-grpo", 1024, 64, 8192),
    ],
)
def test_the_rollout_is_the_recipes(name: str, completions: int, prompts: int, length: int) -> None:
    path = ROOT / "examples" / "open-r1" / f"{name}.yaml"
    run = load(path)
    args = run.spec.training.args

    groups = count_groups(args, world_size=run.spec.resources.world_size)
    assert groups is not None
    assert (groups.of_all, groups.of_all / groups.num_generations) == (completions, prompts)
    assert args["max_completion_length"] == length
    said = rf"Rollout: .* = {completions}, of {prompts} prompts with {groups.num_generations} completions each"
    assert re.search(said, path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", REWARDED, ids=lambda path: path.stem)
def test_a_recipes_prompt_asks_for_the_layout_that_is_rewarded(path: Path) -> None:
    prompt = load(path).spec.system_prompt
    assert prompt is not None

    layout = prompt[prompt.index("<think>") :]
    for name in ("format", "tag_count"):
        assert build(name)(prompts=[""], completions=[layout], completion_ids=[[]]) == [1.0]


def test_the_recipes_that_reward_programs_have_a_sandbox_and_the_others_have_none() -> None:
    planned = {
        path.stem: {manifest["kind"] for manifest in preview_training_run(load(path), now=T0, settings=Settings())}
        for path in REWARDED
    }

    assert {name for name, kinds in planned.items() if "Deployment" in kinds} == {
        "qwen2.5-1.5b-code-grpo",
        "qwen2.5-1.5b-ioi-grpo",
        "qwen2.5-coder-7b-codeforces-grpo",
    }


def test_a_recipe_is_converted_to_its_example_but_for_what_is_said_to_differ() -> None:
    example = load(ROOT / "examples" / "open-r1" / "qwen2.5-1.5b-grpo.yaml")
    recipe = {
        "model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct",
        "torch_dtype": "bfloat16",
        "attn_implementation": "flash_attention_2",
        "dataset_name": "open-r1/OpenR1-Math-220k",
        "dataset_prompt_column": "problem",
        "system_prompt": example.spec.system_prompt,
        "bf16": True,
        "use_vllm": True,
        "do_eval": False,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "hub_model_id": "Qwen2.5-1.5B-Open-R1-GRPO",
        "learning_rate": 2.0e-05,
        "logging_steps": 1,
        "lr_scheduler_type": "cosine",
        "max_prompt_length": 512,
        "max_completion_length": 1024,
        "num_generations": 16,
        "num_train_epochs": 1,
        "output_dir": "data/Qwen2.5-1.5B-Open-R1-GRPO",
        "per_device_train_batch_size": 16,
        "reward_funcs": ["accuracy", "format", "tag_count"],
        "reward_weights": [1.0, 1.0, 1.0],
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "seed": 42,
        "warmup_ratio": 0.1,
    }

    converted = convert_recipe(recipe, name=example.metadata.name or "", accelerate="zero2").resource
    converted["spec"]["model"]["attnImplementation"] = "sdpa"
    converted["spec"]["grpo"]["args"] |= {"beta": 0.04, "loss_type": "bnpo", "use_bias_correction_kl": False}
    assert parse_training_run(converted) == example


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
    distilled = "<｜User｜>2 + 2?<｜Assistant｜>4<｜end▁of▁sentence｜><｜Assistant｜>"  # noqa: RUF001 (the model's own bars)
    for name in ("deepseek-r1-distill-qwen-1.5b-grpo", "deepseek-r1-distill-qwen-7b-grpo"):
        assert rendered.pop(name) == distilled
    assert rendered.keys() == {"smollm2-1.7b", "openr1-distill-7b"}
