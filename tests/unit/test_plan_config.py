"""Sources, strategies and what is refused of a spec."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.api.execution import Parallelism
from posttrain.api.outputs import Checkpoints
from posttrain.api.training_run import TrainingRunSpec
from posttrain.contract.config import HubSource, MountedSource, TrainingConfig, config_hash
from posttrain.plan.checks import find_spec_problems
from posttrain.plan.deepspeed import build_deepspeed_config, find_deepspeed_problems
from posttrain.plan.fsdp import build_fsdp_environment, find_fsdp_problems
from posttrain.plan.quantities import parse_quantity
from posttrain.plan.sources import resolve_source
from posttrain.plan.training_run import preview_training_run
from posttrain.settings import Settings
from tests.support.builders import T0, build_run

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def problems(settings: Settings | None = None, **spec: Any) -> list[str]:
    run = build_run(**spec)
    return [str(problem) for problem in find_spec_problems(run.spec, settings=settings or Settings())]


@pytest.mark.parametrize(
    ("source", "revision", "resolved"),
    [
        ("Qwen/Qwen2.5-1.5B", None, HubSource(repo="Qwen/Qwen2.5-1.5B", revision="main")),
        ("hf://gpt2", "v1", HubSource(repo="gpt2", revision="v1")),
        ("pvc://data/a/b.jsonl", None, MountedSource(mount="claim-data", path="a/b.jsonl")),
        ("file:///srv/models/m", None, MountedSource(mount="files", path="srv/models/m")),
    ],
)
def test_a_source_is_a_repository_or_a_path_in_a_mount(source: str, revision: str | None, resolved: object) -> None:
    assert resolve_source(source, revision=revision) == resolved


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("file://models/m", "absolute"),
        ("pvc://data", "lacks"),
        ("pvc://data/../other", "leaves its root"),
        ("s3://bucket/x", "does not exist"),
    ],
)
def test_a_source_that_is_none_says_what_to_write(source: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        resolve_source(source, revision=None)


@pytest.mark.parametrize(
    ("text", "number"), [("500m", "0.5"), ("8", "8"), ("64Gi", str(64 * 2**30)), ("1.5k", "1500"), ("2M", "2000000")]
)
def test_quantities_are_numbers(text: str, number: str) -> None:
    assert parse_quantity(text) == parse_quantity(number)


@pytest.mark.parametrize("text", ["", "Gi", "8GiB", "-1", "1e3", "1.2.3"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a Kubernetes quantity"):
        parse_quantity(text)


# --- Strategies ------------------------------------------------------------------------------------------------------


def test_deepspeed_leaves_to_the_trainer_what_its_arguments_say() -> None:
    assert build_deepspeed_config(Parallelism(strategy="ZeRO2", offload="Optimizer")) == {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }


def test_zero3_gathers_the_weights_it_saves() -> None:
    zero = build_deepspeed_config(Parallelism(strategy="ZeRO3", offload="Full"))["zero_optimization"]

    assert zero == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
        "stage3_gather_16bit_weights_on_model_save": True,
    }


def test_the_users_deepspeed_settings_are_merged_into_the_generated_ones() -> None:
    config = {"zero_optimization": {"overlap_comm": True}, "communication_data_type": "fp32"}
    merged = build_deepspeed_config(Parallelism(strategy="ZeRO1", config=config))

    assert merged["zero_optimization"] == {"stage": 1, "overlap_comm": True}
    assert merged["communication_data_type"] == "fp32"


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"train_batch_size": 8}, "train_batch_size"),
        ({"gradient_clipping": 1.0}, "gradient_clipping"),
        ({"bf16": {"enabled": True}}, "bf16.enabled"),
        ({"bf16": True}, "bf16"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer.type"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "zero_optimization.offload_param.device"),
    ],
)
def test_deepspeed_settings_of_the_platform_are_refused_with_where_to_set_them(
    config: dict[str, Any], path: str
) -> None:
    found = find_deepspeed_problems(Parallelism(strategy="ZeRO3", config=config), args="spec.sft.args")

    assert [problem.path for problem in found] == [f"spec.parallelism.config.{path}"]
    assert "is set by posttrain" in found[0].message


def test_fsdp_is_told_by_variables_alone() -> None:
    config = {"transformer_cls_to_wrap": ["Qwen2DecoderLayer"], "reshard_after_forward": False}

    assert build_fsdp_environment(Parallelism(strategy="FSDP", offload="Full", config=config)) == {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_OFFLOAD_PARAMS": "true",
        "FSDP_RESHARD_AFTER_FORWARD": "false",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2DecoderLayer",
        "FSDP_VERSION": "2",
    }


def test_fsdp_settings_that_are_owned_unknown_or_of_a_wrong_type_are_refused() -> None:
    config = {"state_dict_type": "SHARDED_STATE_DICT", "auto_wrap": "x", "min_num_params": "many", "zzz": 1}
    found = {
        p.path.rpartition(".")[2]: p.message for p in find_fsdp_problems(Parallelism(strategy="FSDP", config=config))
    }

    assert "is set by posttrain" in found["state_dict_type"]
    assert found["auto_wrap"] == "is no setting of FSDP: did you mean auto_wrap_policy?"
    assert found["min_num_params"] == "must be a whole number"
    assert found["zzz"].startswith("is no setting of FSDP: there are activation_checkpointing,")


# --- What is refused -------------------------------------------------------------------------------------------------


def test_a_sound_spec_has_no_problems() -> None:
    assert problems() == []


def test_every_problem_is_found_at_once() -> None:
    found = problems(
        model={"source": "file:///m"},
        datasets=[{"source": "pvc://inputs/x.jsonl", "revision": "main"}],
        sft={"args": {"learning_rte": 1.0, "output_dir": "x"}},
        resources={"gpusPerNode": 0, "profile": "h300"},
        code={"path": "/src"},
        podOverrides={"env": [{"name": "RANK", "value": "0"}], "labels": {"posttrain.dev/run": "x"}},
    )

    assert [text.partition(":")[0] for text in found] == [
        "spec.sft.args.learning_rte",
        "spec.sft.args.output_dir",
        "spec.model.source",
        "spec.datasets[0].revision",
        "spec.resources.profile",
        "spec.code.path",
        "spec.podOverrides.env[0].name",
        "spec.podOverrides.labels.posttrain.dev/run",
    ]


def test_files_of_the_machine_are_for_settings_that_allow_them() -> None:
    allowed = Settings(allow_file_sources=True)

    assert problems(allowed, model={"source": "file:///m"}, code={"path": "/src"}) == []


@pytest.mark.parametrize("name", ["PET_NNODES", "FSDP_VERSION", "POSTTRAIN_CONFIG", "OMP_NUM_THREADS", "HF_TOKEN"])
def test_variables_that_the_platform_sets_are_refused(name: str) -> None:
    assert len(problems(podOverrides={"env": [{"name": name, "value": "1"}]})) == 1


def test_what_no_adapter_and_no_cpu_can_do_is_refused_before_anything_starts() -> None:
    on_cpus = {"gpusPerNode": 0, "cpu": "2", "memory": "4Gi"}

    assert problems(peft={"method": "LoRA", "dropout": "1"}) == [
        'spec.peft.dropout: "1" drops everything: write a share below 1, as in "0.05"'
    ]
    assert problems(peft={"method": "LoRA", "dropout": "0.99"}) == []
    assert problems(sft={"args": {"fp16": True}}, resources=on_cpus) == [
        "spec.sft.args.fp16: fp16 is for GPUs: leave it out to train in float32 on CPUs, or write bf16: true"
    ]
    assert problems(sft={"args": {"fp16": True}}, resources={"gpusPerNode": 1}) == []
    assert problems(sft={"args": {"fp16": False}}, resources=on_cpus) == []


class NewerCheckpoints(Checkpoints):
    compress: bool = False


class NewerSpec(TrainingRunSpec):
    """What an operator of a later version knows."""

    checkpoints: NewerCheckpoints
    watermark: bool = False


def test_a_run_keeps_its_hash_when_an_operator_knows_more_fields() -> None:
    spec = build_run(checkpoints={"storage": {"claimName": "runs"}, "everySteps": 7}).spec
    newer = NewerSpec.model_validate(spec.to_data())
    changed = NewerSpec.model_validate({**spec.to_data(), "watermark": True})

    assert newer.to_data()["checkpoints"]["compress"] is False
    assert config_hash(newer) == config_hash(spec) != config_hash(changed)


def test_an_older_image_reads_the_config_of_an_operator_that_knows_more_fields() -> None:
    (config_map,) = (
        manifest
        for manifest in preview_training_run(build_run(parallelism={"strategy": "ZeRO2"}), now=T0, settings=Settings())
        if manifest["metadata"]["name"] == "demo-a1" and manifest["kind"] == "ConfigMap"
    )
    config = TrainingConfig.from_json(config_map["data"]["config.json"])
    newer = NewerSpec.model_validate(config.spec.to_data())

    assert config.spec.parallelism.strategy == "ZeRO2"
    assert config.model_copy(update={"spec": newer}).to_json() == config.to_json()
    assert TrainingConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"checkpoints": {"storage": {"claimName": "runs"}, "everySteps": 7}}, True),
        ({"resources": {"queueName": "team", "profile": "big", "numNodes": 2}}, True),
        ({"suspend": True, "restarts": {"maxInfrastructureRestarts": 1}}, True),
        ({"datasetSeed": 0, "parallelism": {"strategy": "DDP"}}, True),  # the defaults, written out
        ({"datasetSeed": 42}, False),
        ({"resources": {"gpusPerNode": 3}}, False),
        ({"checkpoints": {"storage": {"claimName": "others"}}}, False),
    ],
)
def test_the_hash_is_of_what_never_changes_while_the_run_lives(fields: dict[str, Any], same: bool) -> None:
    plain = {"checkpoints": {"storage": {"claimName": "runs"}}, "resources": {}}
    given = config_hash(build_run(**{**plain, **fields}).spec)

    assert (given == config_hash(build_run(**plain).spec)) is same
