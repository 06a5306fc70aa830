"""Packages that a spec implies: found without importing any, and all in the image's lock."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from posttrain.api.training_run import TrainingRunSpec
from posttrain_workloads.packages import find_missing_packages, implied_packages

LOCK = Path(__file__).parents[2] / "images" / "trainer" / "requirements.txt"


def build_spec(**changes: Any) -> TrainingRunSpec:
    return TrainingRunSpec.model_validate(
        {"model": {"source": "org/model"}, "datasets": [{"source": "org/data"}], "sft": {}, **changes}
    )


def build_rewarded(*rewards: dict[str, Any]) -> TrainingRunSpec:
    return TrainingRunSpec.model_validate(
        {"model": {"source": "org/model"}, "datasets": [{"source": "org/data"}], "grpo": {"rewards": list(rewards)}}
    )


def distributions(spec: TrainingRunSpec, args: dict[str, Any] | None = None) -> list[str]:
    return [needed.distribution for needed in implied_packages(spec, args or {})]


def test_a_plain_spec_implies_nothing() -> None:
    assert distributions(build_spec(), {"optim": "adamw_torch_fused", "use_liger_kernel": False}) == []


@pytest.mark.parametrize(
    ("changes", "args", "expected"),
    [
        ({}, {"use_liger_kernel": True}, ["liger-kernel"]),
        ({}, {"optim": "paged_adamw_8bit"}, ["bitsandbytes"]),
        ({}, {"optim": "adamw_bnb_8bit"}, ["bitsandbytes"]),
        ({}, {"optim": "adamw_torch_8bit"}, ["torchao"]),
        ({}, {"optim": "schedule_free_adamw"}, ["schedulefree"]),
        ({"model": {"source": "m", "attnImplementation": "flash_attention_2"}}, {}, ["flash-attn"]),
        ({"model": {"source": "m", "attnImplementation": "sdpa"}}, {}, []),
        ({"peft": {"method": "LoRA"}}, {}, ["peft"]),
        ({"peft": {"method": "QLoRA"}}, {}, ["peft", "bitsandbytes"]),
        ({"parallelism": {"strategy": "ZeRO3"}}, {}, ["deepspeed"]),
        ({"parallelism": {"strategy": "FSDP"}}, {}, []),
        (
            {"tracking": {"reportTo": ["WandB", "Trackio", "MLflow", "TensorBoard"]}},
            {},
            ["wandb", "trackio", "mlflow-skinny", "tensorboard"],
        ),
    ],
)
def test_each_key_implies_its_packages(changes: dict[str, Any], args: dict[str, Any], expected: list[str]) -> None:
    assert distributions(build_spec(**changes), args) == expected


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ({"name": "accuracy"}, ["math-verify"]),
        ({"name": "cosine"}, ["math-verify"]),
        ({"name": "length"}, ["math-verify"]),
        ({"name": "format"}, []),
        ({"name": "repetition_penalty"}, []),
        ({"name": "repetition_penalty", "params": {"language": "zh"}}, ["jieba"]),
    ],
)
def test_each_reward_implies_its_packages(reward: dict[str, Any], expected: list[str]) -> None:
    assert distributions(build_rewarded(reward)) == expected


def test_a_reward_that_asks_for_a_package_is_named() -> None:
    rewarded = build_rewarded({"name": "format"}, {"name": "accuracy"})

    assert implied_packages(rewarded, {})[0].because == "spec.grpo.rewards[1].name: accuracy"


def test_what_the_spec_itself_offers_is_in_the_image() -> None:
    spec = build_spec(
        peft={"method": "QLoRA"},
        parallelism={"strategy": "ZeRO3"},
        tracking={"reportTo": ["WandB", "Trackio", "MLflow", "TensorBoard"]},
    )
    locked = set(re.findall(r"^([a-z0-9-]+)==", LOCK.read_text(), flags=re.MULTILINE))
    assert set(distributions(spec, {"use_liger_kernel": True, "optim": "paged_adamw_8bit"})) <= locked


def test_a_missing_package_is_named_with_the_key_that_asks_for_it() -> None:
    [problem] = find_missing_packages(build_spec(), {"optim": "galore_adamw"})
    assert problem.reason == "PackageMissing"
    assert "spec.sft.args.optim: galore_adamw" in problem.message and "galore-torch" in problem.message
