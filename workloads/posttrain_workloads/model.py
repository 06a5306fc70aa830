"""From spec.model to a tokenizer, a model and an adapter's configuration, each from a folder on this machine.

It owns how a model is found complete and loaded; it must not train it, nor ever unpickle weights.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from posttrain.api.base import JsonObject
from posttrain.contract.config import TrainingConfig
from posttrain_workloads import estimate, hub
from posttrain_workloads.problems import refuse
from posttrain_workloads.sources import describe, locate

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_WEIGHTS_INDEX = "model.safetensors.index.json"
_GIT_LFS = b"version https://git-lfs"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json", "vocab.tiktoken"}
)


def model_folder(config: TrainingConfig, *, environ: Mapping[str, str], weights: bool = True) -> Path:
    """Return the folder that the model lies in: the mounted one, or its snapshot in the Hub's cache.

    Raises:
        InvalidInputs: there is no such folder, or the Hub does not give it.
    """
    located = locate(config.model, environ=environ)
    if located.path is None:
        return hub.fetch_model(str(located.repo), str(located.revision), path="spec.model", weights=weights)
    if not (located.path / _CONFIG).is_file():
        what = f"holds no {_CONFIG}" if located.path.is_dir() else "does not exist or is not a folder"
        raise refuse(
            "ModelNotFound",
            f"spec.model.source: {describe(config.model)} {what}: name the folder that save_pretrained wrote",
        )
    return located.path


def check_files(names: Iterable[str], *, source: str) -> None:
    """See that a model's files are there, and its weights in a format that cannot run code.

    Raises:
        InvalidInputs: there is no config.json, or there are no weights but pickled ones.
    """
    present = set(names)
    if _CONFIG not in present:
        raise refuse("ModelNotFound", f"spec.model.source: {source} holds no {_CONFIG}: it is no transformers model")
    if present & {_WEIGHTS, _WEIGHTS_INDEX}:
        return
    pickled = sorted(name for name in present if name.endswith(_PICKLES))
    if pickled:
        raise refuse(
            "UnsafeWeights",
            f"spec.model.source: {source} has its weights only in {', '.join(pickled)}, and unpickling runs whatever "
            "code is inside: convert them to safetensors (save_pretrained writes nothing else), or take a revision "
            "that has them",
        )
    raise refuse(
        "ModelNotFound",
        f"spec.model.source: {source} holds neither {_WEIGHTS} nor {_WEIGHTS_INDEX}: name a folder with weights",
    )


def check_tokenizer_files(names: Iterable[str], *, source: str) -> None:
    """See that a tokenizer is there.

    Raises:
        InvalidInputs: none is.
    """
    if not _TOKENIZER_FILES & set(names) and not any(name.endswith(".tiktoken") for name in names):
        raise refuse(
            "TokenizerMissing",
            f"spec.model.source: {source} holds no tokenizer ({', '.join(sorted(_TOKENIZER_FILES)[:3])} …): copy the "
            "tokenizer files of the model it was made from into it",
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that make up the model in a folder.

    Raises:
        InvalidInputs: one that the index names is not there.
    """
    index = folder / _WEIGHTS_INDEX
    if not index.is_file():
        return [folder / _WEIGHTS]
    files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise refuse(
            "ModelNotFound", f"spec.model.source: {_WEIGHTS_INDEX} names {', '.join(missing)}, which is not there"
        )
    return files


def count_parameters(folder: Path, *, source: str) -> int:
    """Return the parameters of the model in a folder, whose weights are seen to be there and whole.

    Raises:
        InvalidInputs: they are not.
    """
    files = weight_files(folder)
    for file in files:
        with file.open("rb") as opened:
            if opened.read(len(_GIT_LFS)) == _GIT_LFS:
                raise refuse(
                    "ModelNotFound",
                    f"spec.model.source: {file.name} of {source} is a pointer of Git LFS, which stands for the weights "
                    "and is not them: run `git lfs pull` where the model was cloned",
                )
    try:
        return estimate.count_parameters(files)
    except ValueError as error:  # json's and unicode's errors among them
        raise refuse(
            "ModelNotFound",
            f"spec.model.source: the weights of {source} are not whole ({error}): copy or download them again",
        ) from error


def load_tokenizer(config: TrainingConfig, *, environ: Mapping[str, str]) -> Any:
    """Return the tokenizer, with the spec's chat template and end of turn where they are given.

    Raises:
        InvalidInputs: there is none, or the spec's eosToken is no token of it.
    """
    from transformers import AutoTokenizer

    folder = model_folder(config, environ=environ, weights=False)
    source = describe(config.model)
    check_tokenizer_files([file.name for file in folder.iterdir()], source=source)
    spec = config.spec.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise refuse(
            "TokenizerMissing", f"spec.model.source: the tokenizer of {source} does not load: {error}"
        ) from error
    if spec.chat_template is not None:
        tokenizer.chat_template = spec.chat_template
    if spec.eos_token is not None:
        vocabulary = tokenizer.get_vocab()
        if spec.eos_token not in vocabulary:
            near = difflib.get_close_matches(spec.eos_token, tokenizer.get_added_vocab(), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "name one of its special tokens"
            raise refuse(
                "ConfigInvalid", f"spec.model.eosToken: {spec.eos_token} is no token of {source}'s tokenizer: {hint}"
            )
        tokenizer.eos_token = spec.eos_token
    return tokenizer


def load_model_config(config: TrainingConfig, *, environ: Mapping[str, str]) -> Any:
    """Return the model's configuration with the spec's overrides.

    Raises:
        InvalidInputs: it does not load, or an override is no key of it.
    """
    from transformers import AutoConfig

    folder = model_folder(config, environ=environ, weights=False)
    spec = config.spec.model
    try:
        known = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise refuse("ModelNotFound", f"spec.model.source: {describe(config.model)} does not load: {error}") from error
    if not spec.config:
        return known
    try:
        return type(known).from_dict(_override(known.to_dict(), spec.config))
    except (ValueError, TypeError, KeyError) as error:
        raise refuse("ConfigInvalid", f"spec.model.config: the model refuses it: {error}") from error


def load_model(config: TrainingConfig, *, environ: Mapping[str, str]) -> Any:
    """Return the model with its weights; with ZeRO-3 already sharded, if SFTConfig has been built before.

    Raises:
        InvalidInputs: it does not load.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = model_folder(config, environ=environ)
    check_files([file.name for file in folder.iterdir()], source=describe(config.model))
    count_parameters(folder, source=describe(config.model))
    spec = config.spec
    on_gpus = config.gang.gpus_per_node > 0
    dtype: Any = spec.model.dtype
    if dtype == "auto":
        dtype = "auto" if on_gpus else torch.float32
    arguments: dict[str, Any] = {"dtype": dtype}
    if spec.peft is not None and spec.peft.method == "QLoRA":
        arguments |= {
            "dtype": torch.bfloat16,
            # As in the paper (arXiv:2305.14314); stored as bfloat16, so that ZeRO-3 and FSDP can shard it.
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
                bnb_4bit_quant_storage=torch.bfloat16,
            ),
        }
        if spec.parallelism.strategy not in ("ZeRO3", "FSDP"):
            arguments["device_map"] = {"": torch.cuda.current_device()}
    if spec.model.attn_implementation is not None:
        arguments["attn_implementation"] = spec.model.attn_implementation
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=load_model_config(config, environ=environ),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=spec.model.trust_remote_code,
            **arguments,
        )
    except (OSError, ValueError, ImportError) as error:
        raise refuse("ModelNotFound", f"spec.model.source: {describe(config.model)} does not load: {error}") from error
    model.config.use_cache = False  # a cache of keys and values is for generation, and checkpointing excludes it
    return model


def build_peft_config(config: TrainingConfig) -> Any:
    """Return peft's LoraConfig, or None where all weights are trained."""
    spec = config.spec.peft
    if spec is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=float(spec.dropout),
        target_modules=list(spec.target_modules) if spec.target_modules else "all-linear",
        task_type="CAUSAL_LM",
    )


def check_target_modules(config: TrainingConfig, *, environ: Mapping[str, str]) -> None:
    """See that each of spec.peft.targetModules is in the model, which is built without its weights for that.

    Raises:
        InvalidInputs: one is not, which peft says only where none is.
    """
    spec = config.spec.peft
    if spec is None or spec.target_modules is None:
        return
    import torch
    from transformers import AutoModelForCausalLM

    known = load_model_config(config, environ=environ)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(known, trust_remote_code=config.spec.model.trust_remote_code)
    modules = dict(model.named_modules())
    missing = [
        target for target in spec.target_modules if not any(f".{name}".endswith(f".{target}") for name in modules)
    ]
    if not missing:
        return
    linear = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    near = [match for target in missing for match in difflib.get_close_matches(target, linear, n=1)]
    hint = f"did you mean {' and '.join(near)}? " if near else ""
    raise refuse(
        "ConfigInvalid",
        f"spec.peft.targetModules: {describe(config.model)} has no module {' or '.join(missing)}: {hint}Its linear "
        f"layers are called {', '.join(sorted(linear))}",
    )


def _override(known: dict[str, Any], changes: JsonObject) -> dict[str, Any]:
    """Return a configuration with changes; RoPE by the names it has in config.json files of all ages.

    transformers 5 keeps RoPE in `rope_parameters`, and passes over a `rope_theta` given beside it.
    """
    changes = dict(changes)
    unknown = [key for key in changes if key not in known and key not in ("rope_theta", "rope_scaling")]
    if unknown:
        near = [match for key in unknown for match in difflib.get_close_matches(key, known, n=1)]
        hint = f": did you mean {near[0]}?" if near else ": config.json has none of that name"
        raise refuse(
            "ConfigInvalid", f"spec.model.config: {', '.join(unknown)} is no key of {known['model_type']}{hint}"
        )
    rope: dict[str, Any] = dict(known.get("rope_parameters") or {})
    if "rope_scaling" in changes:
        scaling: Any = changes.pop("rope_scaling") or {"rope_type": "default"}
        rope = {"rope_theta": rope.get("rope_theta"), **scaling}
    if "rope_theta" in changes:
        rope["rope_theta"] = changes.pop("rope_theta")
    return {**known, **({"rope_parameters": rope} if rope else {}), **changes}
