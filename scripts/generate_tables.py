"""Write the tables of training arguments that the operator reads in place of TRL.

    python scripts/generate_tables.py

A row a key of TRL's class: type, declared default, whether posttrain sets it itself, whether it is deprecated, one
sentence of help. It owns which keys posttrain sets itself and what to write instead; it must not judge values. Run by
an interpreter without TRL it goes on in the trainer's environment (`posttrain env trainer`).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

TABLES = Path(__file__).resolve().parent.parent / "operator" / "posttrain" / "api" / "tables"

_CHECKPOINTS = "posttrain writes, verifies and removes checkpoints itself"
_PARALLELISM = "write spec.parallelism.strategy (and spec.parallelism.config for its details)"
_HUB = "publishing to the Hub is not supported yet: the trained model is a folder, upload that"
_NO_EFFECT = "it has no effect on a TrainingRun: leave it out"

_ROLLOUT = "it follows from spec.grpo.rollout"
_MOVING_REFERENCE = (
    "checkpoints hold no reference model that moves, so a restart could not go on with it: leave it out, and write "
    "beta alone"
)

# Keys that posttrain sets itself, in every class. The value completes "<key> is set by posttrain: ...".
OWNED = {
    "auto_find_batch_size": "a run keeps its batch size: when memory does not suffice, write a smaller "
    "per_device_train_batch_size and more gradient_accumulation_steps",
    "ddp_backend": "it follows from the resources: NCCL on GPUs, gloo on CPUs",
    "deepspeed": _PARALLELISM,
    "do_eval": f"{_NO_EFFECT}, and write eval_strategy with spec.evalDatasets or spec.testFraction",
    "do_predict": _NO_EFFECT,
    "do_train": _NO_EFFECT,
    "enable_jit_checkpoint": f"{_CHECKPOINTS}, also when a pod is told to end",
    "fsdp": _PARALLELISM,
    "fsdp_config": _PARALLELISM,
    "hub_always_push": _HUB,
    "hub_model_id": _HUB,
    "hub_private_repo": _HUB,
    "hub_revision": _HUB,
    "hub_strategy": _HUB,
    "hub_token": "write spec.access.hubTokenSecretRef: a token in a resource can be read by everybody who sees it",
    "load_best_model_at_end": "the trained model is the last one; each kept checkpoint can be taken from the storage",
    "local_rank": "torchrun gives it to each process",
    "logging_nan_inf_filter": "it is off, because on it replaces each NaN by an average and hides it",
    "model_init_kwargs": "write spec.model: dtype, attnImplementation, trustRemoteCode, revision, config",
    "output_dir": "it is a folder in spec.checkpoints.storage",
    "parallelism_config": "write spec.parallelism",
    "project": "write spec.tracking.project",
    "push_to_hub": _HUB,
    "report_to": "write spec.tracking.reportTo",
    "resume_from_checkpoint": "a run goes on from its newest verified checkpoint by itself",
    "save_on_each_node": f"{_CHECKPOINTS}, in a storage that all nodes share",
    "save_only_model": "a restart goes on from a checkpoint, which needs the optimizer's state: leave it out",
    "save_steps": "write spec.checkpoints.everySteps",
    "save_strategy": f"{_CHECKPOINTS}: write spec.checkpoints.everySteps",
    "save_total_limit": "write spec.checkpoints.keepLast",
    "trust_remote_code": "write spec.model.trustRemoteCode",
    "use_cpu": "it follows from spec.resources.gpusPerNode (0 trains on CPUs)",
}

# Keys that TRL or transformers accept with a warning; what to write instead.
DEPRECATED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "label_smoothing_factor": None,
    "use_liger_kernel": None,
}

# Keys of older releases, of other libraries and of open-r1's recipes, which no class has.
ELSEWHERE = {
    "attn_implementation": "write spec.model.attnImplementation",
    "chat_template": "write spec.model.chatTemplate",
    "dataset_config": "write spec.datasets[].config",
    "dataset_mixture": "write spec.datasets",
    "dataset_name": "write spec.datasets[].source",
    "dataset_test_split": "write spec.evalDatasets[].split",
    "dataset_train_split": "write spec.datasets[].split",
    "dtype": "write spec.model.dtype",
    "evaluation_strategy": "it is called eval_strategy now",
    "group_by_length": 'write train_sampling_strategy: "group_by_length"',
    "hub_model_revision": _HUB,
    "load_in_4bit": "write spec.peft.method: QLoRA",
    "logging_dir": "TensorBoard's files lie in the run's storage: leave it out",
    "lora_alpha": "write spec.peft.alpha",
    "lora_dropout": "write spec.peft.dropout",
    "lora_r": "write spec.peft.rank",
    "lora_target_modules": "write spec.peft.targetModules",
    "lr": "it is called learning_rate",
    "model_name_or_path": "write spec.model.source",
    "model_revision": "write spec.model.revision",
    "no_cuda": OWNED["use_cpu"],
    "overwrite_hub_revision": _HUB,
    "overwrite_output_dir": "every run has a folder of its own: leave it out",
    "push_to_hub_revision": _HUB,
    "system_prompt": "write spec.systemPrompt",
    "tokenizer_name_or_path": "the tokenizer is the model's own: leave it out",
    "torch_dtype": "write spec.model.dtype",
    "use_liger": "it is called use_liger_kernel now",
    "use_peft": "write spec.peft",
    "wandb_entity": "write spec.tracking.entity",
    "wandb_project": "write spec.tracking.project",
    "wandb_run_group": "write spec.tracking.group",
    "warmup_ratio": "write warmup_steps: a value below 1 is a share of all steps",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A class of TRL, and what is said of its keys alone."""

    class_name: str
    owned: dict[str, str]
    deprecated: dict[str, str | None]
    elsewhere: dict[str, str]
    choices: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """The values of keys that the class takes any text for, and only its trainer refuses at some step."""


_TO_GROUP = "write spec.grpo.rewards, each with its name, weight and params"

TABLES_BY_NAME = {
    "sft_config": Table(
        class_name="SFTConfig",
        owned=OWNED
        | {
            "chat_template_path": "write the template into spec.model.chatTemplate",
            "eos_token": "write spec.model.eosToken",
        },
        deprecated=DEPRECATED | {"pad_token": None},
        elsewhere=ELSEWHERE | {"max_seq_length": "it is called max_length now"},
    ),
    "grpo_config": Table(
        class_name="GRPOConfig",
        owned=OWNED
        | {
            "log_completions_hub_repo": _HUB,
            "ref_model_mixup_alpha": _MOVING_REFERENCE,
            "ref_model_sync_steps": _MOVING_REFERENCE,
            "reward_weights": "write spec.grpo.rewards[].weight",
            "sync_ref_model": _MOVING_REFERENCE,
            "use_vllm": _ROLLOUT,
            "vllm_group_port": _ROLLOUT,
            "vllm_mode": _ROLLOUT,
            "vllm_server_base_url": _ROLLOUT,
            "vllm_server_host": _ROLLOUT,
            "vllm_server_port": _ROLLOUT,
            "vllm_server_timeout": _ROLLOUT,
        },
        deprecated=DEPRECATED
        | {
            "use_transformers_paged": "use_transformers_continuous_batching",
            "vllm_importance_sampling_cap": "vllm_importance_sampling_clip_max",
        },
        elsewhere=ELSEWHERE
        | {
            "chat_template_path": "write the template into spec.model.chatTemplate",
            "code_language": _TO_GROUP,
            "cosine_max_len": _TO_GROUP,
            "cosine_max_value_correct": _TO_GROUP,
            "cosine_max_value_wrong": _TO_GROUP,
            "cosine_min_value_correct": _TO_GROUP,
            "cosine_min_value_wrong": _TO_GROUP,
            "dataset_prompt_column": "write spec.promptColumn",
            "eos_token": "write spec.model.eosToken",
            "max_completion_len": _TO_GROUP,
            "max_length": "a completion is bounded by max_completion_length, and a prompt is never cut",
            "max_prompt_length": "a prompt is never cut, and one that is too long for the model is refused beforehand",
            "repetition_max_penalty": _TO_GROUP,
            "repetition_n_grams": _TO_GROUP,
            "reward_funcs": _TO_GROUP,
            "soft_punish_cache": _TO_GROUP,
            "wandb_log_unique_prompts": "it is called log_unique_prompts",
        },
        choices={
            "importance_sampling_level": ["token", "sequence"],
            "loss_type": ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"],
            "multi_objective_aggregation": ["sum_then_normalize", "normalize_then_sum"],
            "scale_rewards": ["group", "batch", "none"],
            "vllm_importance_sampling_mode": ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
        },
    ),
}

# "The `keep_end` value is deprecated" is about one value, not about the key.
_DEPRECATED_HELP = re.compile(r"\bdeprecated\b(?! value)", re.IGNORECASE)
_DEPRECATED_VALUE = re.compile(r"value is deprecated")
_NOT_ABOUT_THE_KEY = frozenset({"local_rank"})  # it mentions torch.distributed.launch, which is deprecated


def main() -> None:
    """Write every table."""
    if importlib.util.find_spec("trl") is None:
        go_on_in_trainer()
    TABLES.mkdir(exist_ok=True)
    for name in TABLES_BY_NAME:
        (TABLES / f"{name}.json").write_text(render_table(name))


def go_on_in_trainer() -> None:
    """Replace this process by the same call in the trainer's environment."""
    posttrain = Path(sys.executable).with_name("posttrain")
    output = subprocess.run([posttrain, "env", "trainer"], stdout=subprocess.PIPE, text=True, check=True).stdout
    interpreter = output.splitlines()[-1]
    os.execv(interpreter, [interpreter, *sys.argv])


def render_table(name: str) -> str:
    """Return the table of that name as the text of its file."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, imported by TRL, warns that it looks for one
    import trl

    table = TABLES_BY_NAME[name]
    rows = build_rows(getattr(trl, table.class_name), table)
    for key in (*table.owned, *table.deprecated, *table.choices):
        if key not in rows:
            raise SystemExit(f"{key} is no key of trl.{table.class_name}: take it out of {Path(__file__).name}")
    for key in table.elsewhere:
        if key in rows:
            raise SystemExit(f"{key} is a key of trl.{table.class_name}: take it out of its `elsewhere`")
    content = {
        "class": f"trl.{table.class_name}",
        "library": {package: importlib.metadata.version(package) for package in ("transformers", "trl")},
        "keys": rows,
        "elsewhere": table.elsewhere,
    }
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def build_rows(config: type[Any], table: Table) -> dict[str, dict[str, Any]]:
    """Return a row for each key that `config` takes."""
    from pydantic import TypeAdapter

    hints = get_type_hints(config)
    rows = {}
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        text = field.metadata.get("help") or ""
        if is_said_deprecated(config, field) and field.name not in table.deprecated:
            raise SystemExit(f"{field.name} is deprecated ({text}): enter it in `deprecated` with what replaces it")
        schema = TypeAdapter(hints[field.name]).json_schema()
        choices = table.choices.get(field.name) or field.metadata.get("choices")
        rows[field.name] = {
            "type": reduce_schema(schema, choices=choices, definitions=schema.get("$defs", {})),
            "default": declared_default(field),
            "owned": table.owned.get(field.name),
            "deprecated": field.name in table.deprecated,
            "replacement": table.deprecated.get(field.name),
            "help": first_sentence(text),
        }
    return rows


def is_said_deprecated(config: type[Any], field: dataclasses.Field[Any]) -> bool:
    """Tell whether the help of the key says so, in the class or, where it is overridden there, in a base class."""
    texts = [field.metadata.get("help") or ""]
    for base in config.__mro__[1:]:
        inherited = getattr(base, "__dataclass_fields__", {}).get(field.name)
        if inherited is not None:
            texts.append(inherited.metadata.get("help") or "")
    return field.name not in _NOT_ABOUT_THE_KEY and any(
        _DEPRECATED_HELP.search(text) and not _DEPRECATED_VALUE.search(text) for text in texts
    )


def declared_default(field: dataclasses.Field[Any]) -> Any:
    """Return the default as JSON data."""
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return json.loads(json.dumps(default))


def first_sentence(text: str) -> str:
    """Return the first sentence of a help text, on one line."""
    text = " ".join(text.replace("%%", "%").split()).removeprefix("Deprecated. ")
    return re.split(r"(?<=[^.]\.)\s+(?=[A-Z`'\"(])", text)[0]


def reduce_schema(schema: dict[str, Any], *, choices: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return `schema` in the small language of the tables: type, anyOf, enum, items, additionalProperties."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        members: list[dict[str, Any]] = []
        for part in schema["anyOf"]:
            member = reduce_schema(part, choices=choices, definitions=definitions)
            if member not in members:
                members.append(member)
        # An annotation `SomeEnum | str` takes the names of the members only: the class converts them.
        if any(is_text_enum(member) for member in members):
            members = [member for member in members if member != {"type": "string"}]
        members.sort(key=lambda member: member == {"type": "null"})
        return members[0] if len(members) == 1 else {"anyOf": members}
    if "const" in schema:
        return {"enum": [schema["const"]]}
    if "enum" in schema:
        return {"enum": list(schema["enum"])}
    if schema["type"] == "string" and choices:
        return {"enum": [str(choice) for choice in choices]}
    reduced: dict[str, Any] = {"type": schema["type"]}
    if schema["type"] == "array":
        reduced["items"] = reduce_schema(schema["items"], choices=None, definitions=definitions)
    if isinstance(schema.get("additionalProperties"), dict):
        reduced["additionalProperties"] = reduce_schema(
            schema["additionalProperties"], choices=None, definitions=definitions
        )
    return reduced


def is_text_enum(schema: dict[str, Any]) -> bool:
    """Tell whether `schema` is a choice among strings."""
    return all(isinstance(value, str) for value in schema.get("enum", [0]))


if __name__ == "__main__":
    main()
