"""What becomes of a recipe of open-r1 or TRL."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.api.loader import dump_document, load_documents
from posttrain.api.rewards import REWARDS
from posttrain.api.validate import parse_training_run
from posttrain.convert import STRATEGIES, Conversion, convert_recipe
from posttrain.errors import InvalidResource
from posttrain.recipe import UnusableRecipe
from posttrain.recipe_rewards import PARAMS

SMALL: dict[str, Any] = {"model_name_or_path": "org/model", "dataset_name": "org/data"}


def convert(accelerate: str | None = "zero3", **keys: Any) -> Conversion:
    return convert_recipe({**SMALL, **keys}, name="converted", accelerate=accelerate)


def spec_of(accelerate: str | None = "zero3", **keys: Any) -> dict[str, Any]:
    spec: dict[str, Any] = convert(accelerate, **keys).resource["spec"]
    return spec


RECIPE = """\
# Model
model_name_or_path: Qwen/Qwen2.5-1.5B-Instruct
model_revision: main
torch_dtype: bfloat16
attn_implementation: sdpa
trust_remote_code: false
chat_template: "{{ messages }}"
eos_token: <|im_end|>
system_prompt: Think.

# Data
dataset_mixture:
  datasets:
    - id: open-r1/one
      config: all
      split: train
      columns: [messages]
      weight: 0.5
    - id: open-r1/two
      columns: [messages]
      weight: 1.0
  seed: 7
  test_split_size: 0.1

# Trainer
benchmarks: [aime24]
bf16: true
callbacks: [push_to_hub_revision]
do_eval: false
eval_strategy: 'no'
gradient_accumulation_steps: 8
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
hub_model_id: org/out
hub_strategy: every_save
learning_rate: 1e-5
logging_steps: 1
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs:
  min_lr_rate: 0.1
max_seq_length: 4096
num_train_epochs: 3
output_dir: data/out
overwrite_output_dir: true
packing: true
per_device_train_batch_size: 2
push_to_hub: true
report_to: [wandb]
save_steps: 100
save_strategy: steps
save_total_limit: 1
seed: 42
use_liger: true
wandb_entity: team
wandb_project: reasoning
wandb_run_group: first
warmup_ratio: 0.05
wramup: 3
"""


def test_a_whole_recipe() -> None:
    (document,) = load_documents(RECIPE, origin="recipe.yaml")
    conversion = convert_recipe(document.data, name="distill", accelerate="zero2")

    assert conversion.resource == {
        "apiVersion": "posttrain.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": "distill"},
        "spec": {
            "model": {
                "source": "Qwen/Qwen2.5-1.5B-Instruct",
                "revision": "main",
                "trustRemoteCode": False,
                "chatTemplate": "{{ messages }}",
                "eosToken": "<|im_end|>",
                "dtype": "bfloat16",
                "attnImplementation": "sdpa",
            },
            "datasets": [
                {
                    "source": "open-r1/one",
                    "config": "all",
                    "split": "train",
                    "columns": ["messages"],
                    "fraction": "0.5",
                },
                {"source": "open-r1/two", "columns": ["messages"]},
            ],
            "datasetSeed": 7,
            "testFraction": "0.1",
            "parallelism": {"strategy": "ZeRO2"},
            "resources": {"numNodes": 1, "gpusPerNode": 8},
            "checkpoints": {"everySteps": 100, "keepLast": 1},
            "tracking": {"reportTo": ["WandB"], "project": "reasoning", "entity": "team", "group": "first"},
            "sft": {
                "args": {
                    "bf16": True,
                    "eval_strategy": "no",
                    "gradient_accumulation_steps": 8,
                    "activation_checkpointing": True,
                    "activation_checkpointing_kwargs": {"use_reentrant": False},
                    "learning_rate": 1e-5,
                    "logging_steps": 1,
                    "lr_scheduler_type": "cosine_with_min_lr",
                    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
                    "max_length": 4096,
                    "num_train_epochs": 3,
                    "packing": True,
                    "per_device_train_batch_size": 2,
                    "seed": 42,
                    "use_liger_kernel": True,
                    "warmup_steps": 0.05,
                }
            },
        },
    }
    dropped = dict(conversion.dropped)
    assert dropped.keys() == {
        "benchmarks", "callbacks", "do_eval", "hub_model_id", "hub_strategy", "output_dir", "overwrite_output_dir",
        "push_to_hub", "system_prompt", "wramup",
    }  # fmt: skip
    assert "not supported yet" in dropped["hub_model_id"]
    assert "push_to_hub_revision" in dropped["callbacks"]
    assert "spec.systemPrompt" in dropped["system_prompt"]
    assert "spec.checkpoints.storage" in dropped["output_dir"]
    assert "no such key" in dropped["wramup"]
    assert "max_seq_length is called max_length now" in conversion.notes
    assert any("WANDB_API_KEY" in note for note in conversion.notes)


def test_every_key_is_in_the_resource_or_named_as_dropped() -> None:
    (document,) = load_documents(RECIPE, origin="recipe.yaml")
    conversion = convert_recipe(document.data, name="distill")

    text = dump_document(conversion.resource)
    (again,) = load_documents(text, origin="converted")
    assert again.data == conversion.resource
    assert parse_training_run(again.data).metadata.name == "distill"
    for key, why in conversion.dropped:
        assert key.split(".")[0] in document.data
        assert why


def test_without_an_accelerate_configuration_the_run_has_the_defaults_and_says_so() -> None:
    conversion = convert(accelerate=None)

    assert conversion.resource["spec"].keys() == {"model", "datasets", "sft"}
    assert "ddp, zero1, zero2, zero3 or fsdp" in conversion.notes[-1]


@pytest.mark.parametrize(("name", "strategy"), STRATEGIES.items())
def test_an_accelerate_configuration_gives_the_strategy(name: str, strategy: str) -> None:
    spec = spec_of(accelerate=name)

    assert spec["parallelism"] == {"strategy": strategy}
    assert spec["resources"] == {"numNodes": 1, "gpusPerNode": 8}


def test_an_unknown_accelerate_configuration_is_refused() -> None:
    with pytest.raises(UnusableRecipe, match=r'"zero_3" is no accelerate configuration that is known here: take zero3'):
        convert(accelerate="zero_3")


def test_lora_keys_become_peft() -> None:
    spec = spec_of(
        use_peft=True, lora_r=8, lora_alpha=16, lora_dropout=0.1, lora_target_modules=["q_proj"], lora_task_type="x"
    )

    assert spec["peft"] == {
        "method": "LoRA",
        "rank": 8,
        "alpha": 16,
        "dropout": "0.1",
        "targetModules": ["q_proj"],
    }


def test_all_linear_modules_are_the_default() -> None:
    assert spec_of(use_peft=True, lora_target_modules="all-linear")["peft"] == {"method": "LoRA"}


def test_four_bits_with_peft_are_qlora() -> None:
    conversion = convert(use_peft=True, load_in_4bit=True, bnb_4bit_quant_type="nf4")

    assert conversion.resource["spec"]["peft"] == {"method": "QLoRA"}
    assert "nothing to set" in dict(conversion.dropped)["bnb_4bit_quant_type"]


def test_without_peft_the_adapters_keys_are_dropped() -> None:
    conversion = convert(lora_r=8, load_in_4bit=True)

    assert "peft" not in conversion.resource["spec"]
    assert conversion.dropped == (
        ("lora_r", "use_peft is not set, so all weights are trained"),
        ("load_in_4bit", "use_peft is not set, and weights in 4 bits cannot be trained themselves"),
    )


def test_a_dataset_by_name_with_its_splits() -> None:
    spec = spec_of(dataset_config="math", dataset_train_split="train_sft", eval_strategy="steps", eval_steps=100)

    assert spec["datasets"] == [{"source": "org/data", "config": "math", "split": "train_sft"}]
    assert spec["evalDatasets"] == [{"source": "org/data", "config": "math", "split": "test"}]
    assert spec["sft"]["args"] == {"eval_strategy": "steps", "eval_steps": 100}


def test_a_test_split_that_nothing_evaluates_is_dropped() -> None:
    conversion = convert(dataset_test_split="test", eval_strategy=False)

    assert "evalDatasets" not in conversion.resource["spec"]
    assert conversion.resource["spec"]["sft"]["args"] == {"eval_strategy": "no"}
    assert dict(conversion.dropped).keys() == {"dataset_test_split"}


def test_a_mixture_goes_before_a_name() -> None:
    conversion = convert(dataset_config="x", dataset_mixture={"datasets": [{"id": "org/a", "wieght": 1}], "sed": 1})

    assert conversion.resource["spec"]["datasets"] == [{"source": "org/a"}]
    assert dict(conversion.dropped).keys() == {
        "dataset_name",
        "dataset_config",
        "dataset_mixture.sed",
        "dataset_mixture.datasets[0].wieght",
    }


def test_evaluation_without_held_out_data_is_dropped() -> None:
    conversion = convert(eval_strategy="steps", dataset_mixture={"datasets": [{"id": "org/a"}], "test_split_size": 100})

    assert "eval_strategy" not in conversion.resource["spec"]["sft"]["args"]
    assert dict(conversion.dropped).keys() == {"dataset_name", "dataset_mixture.test_split_size", "eval_strategy"}


def test_checkpoints_by_epochs_or_shares_take_the_default() -> None:
    by_epoch = convert(save_strategy="epoch", save_steps=100)
    assert "checkpoints" not in by_epoch.resource["spec"]
    assert dict(by_epoch.dropped).keys() == {"save_strategy", "save_steps"}

    by_share = convert(save_strategy="steps", save_steps=0.2)
    assert "checkpoints" not in by_share.resource["spec"]
    assert "share" in dict(by_share.dropped)["save_steps"]


def test_a_checkpoint_without_the_optimizer_is_refused() -> None:
    assert "optimizer" in dict(convert(save_only_model=True).dropped)["save_only_model"]


def test_trackers_that_are_not_known_and_keys_of_trackers_that_are_not_used() -> None:
    conversion = convert(report_to=["comet_ml", "tensorboard"], wandb_project="p", project="q")

    assert conversion.resource["spec"]["tracking"] == {"reportTo": ["TensorBoard"], "project": "q"}
    assert dict(conversion.dropped).keys() == {"report_to", "wandb_project"}
    assert convert(report_to="none").resource["spec"].keys() == convert().resource["spec"].keys()


def test_what_means_something_else_here_is_noted() -> None:
    notes = "\n".join(convert(attn_implementation="flash_attention_2", packing=True).notes)

    assert "take sdpa" in notes
    assert "packing_strategy: wrapped" in notes
    assert convert(attn_implementation="sdpa", packing=True, packing_strategy="bfd").notes == ()


def test_a_path_becomes_a_file() -> None:
    spec = spec_of(model_name_or_path="/models/a", dataset_name="./rows.jsonl")

    assert spec["model"]["source"] == "file:///models/a"
    assert spec["datasets"][0]["source"] == "file://./rows.jsonl"


def test_a_value_of_a_wrong_type_is_dropped_with_what_is_wrong() -> None:
    dropped = dict(convert(packing="sometimes").dropped)

    assert "must be true or false" in dropped["packing"]


def test_an_empty_key_is_unset_unless_empty_means_something() -> None:
    conversion = convert(lora_r=None, eval_steps=None, model_revision=None, max_seq_length=None)

    assert conversion.resource["spec"]["sft"]["args"] == {"max_length": None}
    assert conversion.resource["spec"]["model"] == {"source": "org/model"}
    assert conversion.dropped == ()


def test_a_key_under_its_old_and_its_new_name_is_taken_once() -> None:
    conversion = convert(max_length=10, max_seq_length=20)

    assert conversion.resource["spec"]["sft"]["args"] == {"max_length": 10}
    assert conversion.dropped == (("max_seq_length", "max_length is given too"),)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"reward_funcs": []}, "reward_funcs is no list of names"),
        ({"reward_funcs": {"accuracy": 1.0}}, "reward_funcs is no list of names"),
        (
            {"reward_funcs": ["accuracy", "format"], "reward_weights": [1.0]},
            r"reward_weights has 1 numbers for 2 rewards \(accuracy and format\)",
        ),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"dataset_name": None}, "dataset_name and dataset_mixture are missing"),
        ({"dataset_mixture": ["org/a"]}, "dataset_mixture has no list of datasets"),
        ({"dataset_mixture": {"datasets": [{"name": "org/a"}]}}, r"dataset_mixture.datasets\[0\] has no id"),
    ],
)
def test_what_is_no_recipe_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UnusableRecipe, match=said):
        convert(**keys)


def test_what_would_not_be_valid_is_told_by_its_field() -> None:
    with pytest.raises(InvalidResource) as caught:
        convert(dataset_mixture={"datasets": [{"id": "org/a", "weight": 2}]})

    assert [problem.path for problem in caught.value.problems] == ["spec.datasets[0].fraction"]


# --- GRPO -------------------------------------------------------------------------------------------------------------

REWARDED = """\
model_name_or_path: org/model
dataset_name: org/problems
dataset_prompt_column: problem
system_prompt: Think.
reward_funcs: [accuracy, cosine, repetition_penalty, code_format, soft_overlong_punishment]
reward_weights: [1.0, 0.5, 1, 0.1, 1.0]
cosine_min_value_wrong: -1.0
cosine_max_value_wrong: -0.5
cosine_min_value_correct: 0.25
cosine_max_value_correct: 1.0
cosine_max_len: 4000
repetition_n_grams: 4
repetition_max_penalty: -0.5
code_language: cpp
max_completion_len: 2048
soft_punish_cache: 512
code_eval_test_batch_size: 3
code_provider: e2b
parallel_code_exec_per_proc: 2
beta: 0.01
loss_type: dr_grpo
scale_rewards: false
num_generations: 4
max_prompt_length: 512
max_completion_length: 2048
per_device_train_batch_size: 4
temperature: 0.7
use_bias_correction_kl: false
use_vllm: true
vllm_device: auto
vllm_gpu_memory_utilization: 0.7
wandb_log_unique_prompts: true
num_completions_to_print: 2
reference: x
"""


def test_a_whole_grpo_recipe() -> None:
    (document,) = load_documents(REWARDED, origin="recipe.yaml")
    conversion = convert_recipe(document.data, name="rewarded", accelerate="zero3")

    assert conversion.resource["spec"] == {
        "model": {"source": "org/model"},
        "datasets": [{"source": "org/problems"}],
        "promptColumn": "problem",
        "systemPrompt": "Think.",
        "parallelism": {"strategy": "ZeRO3"},
        "resources": {"numNodes": 1, "gpusPerNode": 8},
        "grpo": {
            "rollout": {"mode": "Colocate"},
            "rewards": [
                {"name": "accuracy"},
                {
                    "name": "cosine",
                    "weight": "0.5",
                    "params": {
                        "min_value_wrong": -1.0,
                        "max_value_wrong": -0.5,
                        "min_value_correct": 0.25,
                        "max_value_correct": 1.0,
                        "max_len": 4000,
                    },
                },
                {"name": "repetition_penalty", "params": {"ngram_size": 4, "max_penalty": -0.5}},
                {"name": "code_format", "weight": "0.1", "params": {"language": "cpp"}},
                {
                    "name": "soft_overlong_punishment",
                    "params": {"max_completion_len": 2048, "soft_punish_cache": 512},
                },
            ],
            "args": {
                "beta": 0.01,
                "loss_type": "dr_grpo",
                "scale_rewards": "none",
                "num_generations": 4,
                "max_completion_length": 2048,
                "per_device_train_batch_size": 4,
                "temperature": 0.7,
                "use_bias_correction_kl": False,
                "log_unique_prompts": True,
                "num_completions_to_print": 2,
                "vllm_gpu_memory_utilization": 0.7,
            },
        },
    }
    dropped = dict(conversion.dropped)
    assert dropped.keys() == {
        "code_eval_test_batch_size", "code_provider", "parallel_code_exec_per_proc", "max_prompt_length",
        "vllm_device", "reference",
    }  # fmt: skip
    assert "ioi_code or cf_code, which reward_funcs does not name" in dropped["code_eval_test_batch_size"]
    assert "posttrain's own sandbox" in dropped["code_provider"]
    assert "never cut" in dropped["max_prompt_length"]
    assert "GRPOConfig (TRL" in dropped["vllm_device"]
    assert "GRPOConfig (TRL" in dropped["reference"]
    assert conversion.notes == (
        "use_vllm: the recipe's vLLM is a server of its own, and here it is inside the trainer "
        "(spec.grpo.rollout.mode: Colocate), on the same GPUs",
        "wandb_log_unique_prompts is called log_unique_prompts now",
    )


def test_a_recipe_without_vllm_keeps_nothing_of_it() -> None:
    recipe = {
        "model_name_or_path": "org/model",
        "dataset_name": "org/problems",
        "reward_funcs": ["accuracy"],
        "use_vllm": False,
        "vllm_gpu_memory_utilization": 0.7,
    }
    conversion = convert_recipe(recipe, name="plain")

    assert conversion.resource["spec"]["grpo"] == {"rewards": [{"name": "accuracy"}], "args": {}}
    assert conversion.dropped == (
        ("vllm_gpu_memory_utilization", "use_vllm is not set, so completions come from the trainer's own model"),
    )


def test_every_parameter_of_a_reward_has_its_key_in_a_recipe() -> None:
    taken = {target for targets in PARAMS.values() for target in targets}

    # The script of open-r1 has no key for the language of its words.
    there = {(info.name, param.name) for info in REWARDS.values() for param in info.params}
    assert taken == there - {("repetition_penalty", "language")}


def test_a_recipe_without_rewards_has_open_r1s() -> None:
    conversion = convert(num_generations=8, per_device_train_batch_size=8)

    assert conversion.resource["spec"]["grpo"]["rewards"] == [
        {"name": "accuracy"},
        {"name": "format"},
        {"name": "tag_count"},
    ]
    assert any("accuracy, format and tag_count" in note for note in conversion.notes)


def test_one_reward_and_its_weight_need_no_list() -> None:
    assert spec_of(reward_funcs="format", reward_weights=0.5)["grpo"]["rewards"] == [
        {"name": "format", "weight": "0.5"}
    ]


def test_defaults_that_are_others_now_are_noted() -> None:
    notes = "\n".join(convert(reward_funcs=["cosine"]).notes)

    assert "cosine_min_value_wrong is -1.0 by default here" in notes
    assert "beta is not set: it is 0.0 by default now, and in TRL 0.18 training was with 0.04" in notes
    assert 'loss_type is not set: it is "dapo" by default now, and in TRL 0.18 training was with "bnpo"' in notes


def test_a_length_of_whole_rows_is_none_of_grpo() -> None:
    dropped = dict(convert(reward_funcs=["format"], max_seq_length=1024).dropped)

    assert "max_completion_length" in dropped["max_seq_length"]


def test_groups_that_8_gpus_cannot_fill_need_another_number_of_gpus() -> None:
    recipe = {**SMALL, "num_generations": 7, "per_device_train_batch_size": 16}
    with pytest.raises(InvalidResource, match="7 completions of a prompt do not fill up"):
        convert_recipe(recipe, name="converted", accelerate="zero2")

    spec = convert_recipe(recipe, name="converted", accelerate="zero2", gpus=7).resource["spec"]
    assert spec["resources"] == {"numNodes": 1, "gpusPerNode": 7}


def test_a_reward_that_runs_programs_is_taken_with_its_parameters() -> None:
    assert spec_of(reward_funcs=["format", "ioi_code"], code_eval_test_batch_size=3)["grpo"]["rewards"] == [
        {"name": "format"},
        {"name": "ioi_code", "params": {"test_batch_size": 3}},
    ]


def test_an_unknown_reward_is_refused_by_its_field() -> None:
    with pytest.raises(InvalidResource, match="did you mean accuracy"):
        convert(reward_funcs=["acuracy"])
