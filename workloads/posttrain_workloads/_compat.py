"""Workarounds for the libraries' own gaps, each with the condition under which it goes.

It owns every use of a library's private names; it must not hold anything that a public interface can do.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.api.training_run import Method
from posttrain_workloads.completions import Completions

_FORMER_NAMES = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}


def save_logging_state(trainer: Any, folder: Path, *, rank: int, method: Method) -> None:
    """Keep what has been added up since the last log line, which a checkpoint of transformers does not hold.

    transformers 5.23 begins a resumed run with an empty sum (trainer.py:1647-1649), and TRL 1.16 with empty metrics
    and, in SFT, no tokens (sft_trainer.py, `_metrics` and `_total_train_tokens`): the first line after a resume is then
    the mean of other steps than in a run that went through. Goes when both restore them. The loss is each rank's own.
    """
    state = {
        "tr_loss": trainer._tr_loss.item(),
        "last_logged": trainer._globalstep_last_logged,
        "metrics": dict(trainer._metrics["train"]),
    }
    if method == "sft":
        state["tokens"] = trainer._total_train_tokens
    _file(folder, rank).write_text(json.dumps(state))


def restore_logging_state(trainer: Any, folder: Path, *, rank: int, method: Method) -> None:
    """Put back what `save_logging_state` kept; called when training begins, after transformers has reset it."""
    file = _file(folder, rank)
    if not file.exists():  # of a gang that had fewer ranks
        return
    state = json.loads(file.read_text())
    trainer._tr_loss += state["tr_loss"]
    # The steps before the checkpoint belong to the log line, and not to this process's own mean over its steps.
    trainer._total_loss_scalar -= state["tr_loss"]
    trainer._globalstep_last_logged = state["last_logged"]
    trainer._metrics["train"].update(state["metrics"])
    if method == "sft":
        trainer._total_train_tokens = state["tokens"]


def skip_epochs(sampler: Any, epochs: int) -> None:
    """Let a sampler of TRL's prompts begin with the order of a later epoch.

    TRL 1.16's RepeatSampler draws an order from its own generator each time that it is iterated over (trainer/utils.py)
    and has no set_epoch, so a run that is resumed in its third epoch would see the prompts of the first one again. Goes
    when it has one.
    """
    if sampler.shuffle:
        import torch

        for _ in range(epochs):
            torch.randperm(sampler.num_samples, generator=sampler.generator)


def save_rollout(trainer: Any, folder: Path, *, rank: int) -> None:
    """Keep the completions that the next steps still train on, which a checkpoint of TRL does not hold.

    TRL 1.16 begins a resumed run with a new rollout, wherever in a cycle of `steps_per_generation * num_iterations`
    micro-batches the checkpoint was made (grpo_trainer.py, `_step` and `_buffered_inputs`): its prompts are then not
    those of a run that went through. Goes when it keeps them itself. Each rank has its own.
    """
    import torch

    cycle = trainer.args.steps_per_generation * trainer.num_iterations
    kept = trainer._buffered_inputs if trainer._step % cycle else None
    state = {"step": trainer._step, "world_size": trainer.args.world_size, "batches": kept}
    torch.save(state, folder / f"rollout_{rank}.pt")


def restore_rollout(trainer: Any, folder: Path, *, rank: int) -> bool:
    """Put back what `save_rollout` kept; return False if that was a rollout of a gang with more ranks, or fewer."""
    import torch
    from accelerate.utils import send_to_device

    file = folder / f"rollout_{rank}.pt"
    if not file.exists():
        return True
    state = torch.load(file, map_location="cpu", weights_only=True)
    if state["world_size"] != trainer.args.world_size:
        return state["batches"] is None
    trainer._step = state["step"]
    trainer._buffered_inputs = send_to_device(state["batches"], trainer.args.device)
    return True


def add_metric(trainer: Any, name: str, value: float) -> None:
    """Add a number to those of which TRL logs the mean since the last log line."""
    trainer._metrics["train"][name].append(value)


def newest_completions(trainer: Any, *, count: int) -> Completions:
    """Return the last `count` completions of all ranks with their rewards, which TRL keeps for its own table."""
    kept = trainer._logs

    def last(values: Any) -> list[Any]:
        return list(values)[-count:]

    return Completions(
        prompts=last(kept["prompt"]),
        completions=last(kept["completion"]),
        rewards={name: last(values) for name, values in kept["rewards"].items()},
        advantages=last(kept["advantages"]),
        weights=_newest_weights(trainer, count=count) if trainer.use_vllm else None,
    )


def _newest_weights(trainer: Any, *, count: int) -> list[str]:
    """Return the version of the weights that each of the last `count` completions is from."""
    if trainer.vllm_mode == "server":
        return [trainer.vllm_generation.vllm_client.version] * count  # a server that has others is not asked
    # An engine inside the trainer gets the weights of the step that begins, where it has not had them yet.
    return [f"step-{trainer._last_loaded_step}"] * count


def tokenize_prompts(trainer: Any, prompts: Sequence[Any]) -> list[list[int]]:
    """Return the tokens of prompts as a GRPOTrainer makes them; TRL 1.16 has no public name for it.

    Goes when a rollout function is handed tokens, or a way to make them.
    """
    prompt_ids, _, _ = trainer._tokenize_prompts(list(prompts))
    return [list(ids) for ids in prompt_ids]


def generate_tokens(
    trainer: Any, prompt_ids: Sequence[Sequence[int]]
) -> tuple[list[list[int]], list[list[float | None]] | None]:
    """Return a completion of each prompt as a GRPOTrainer makes it, by whatever generates for it.

    TRL 1.16 has no public name for it, and one for vLLM alone (trainer.vllm_generation). Goes when it has one.
    """
    completion_ids, logprobs = trainer._generate_single_turn(
        [list(ids) for ids in prompt_ids], None, {}, num_generations=1
    )
    return [list(ids) for ids in completion_ids], logprobs


def post_progress_in_background(trainer: Any) -> None:
    """Take the posts of transformers' KubeflowCallback out of the training thread.

    transformers 5.23 posts at the end of a step and waits up to 5 s for the answer, at most every 5 s
    (integration_utils.py:2521-2557): a server that takes connections and does not answer halves the speed. Here a
    thread posts the latest report, and what comes meanwhile replaces what waits. Goes when the callback does so itself.
    """
    from transformers.integrations import KubeflowCallback

    class BackgroundKubeflowCallback(KubeflowCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._changed = threading.Condition()
            self._latest: tuple[tuple[Any, ...], dict[str, Any]] | None = None
            threading.Thread(target=self._post, name="progress-sender", daemon=True).start()

        def _update_status(self, *args: Any, **kwargs: Any) -> bool:
            if "metrics" in kwargs:
                kwargs["metrics"] = dict(kwargs["metrics"] or {})
            with self._changed:
                self._latest = (args, kwargs)
                self._changed.notify_all()
            return True

        def _post(self) -> None:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._latest is not None)
                    assert self._latest is not None
                    (args, kwargs), self._latest = self._latest, None
                super()._update_status(*args, **kwargs)

    if trainer.pop_callback(KubeflowCallback) is not None:
        trainer.add_callback(BackgroundKubeflowCallback())


def hub_transport_error() -> type[Exception]:
    """Return what the Hub's client raises where the network fails: another library's error in each of its majors.

    huggingface_hub 2 speaks through httpx2, and 1.x, which the transformers of the vllm image wants, through httpx.
    Goes when vLLM takes transformers 5.18, which takes huggingface_hub 2.
    """
    import huggingface_hub

    error: type[Exception]
    if huggingface_hub.__version__.startswith("1."):
        import httpx

        error = httpx.TransportError
    else:
        import httpx2

        error = httpx2.TransportError
    return error


def name_args(values: Mapping[str, Any], args_class: Any) -> dict[str, Any]:
    """Return arguments under the names that TRL's class has for them in this environment.

    The transformers of the vllm image (5.17) has gradient_checkpointing where 5.23 has activation_checkpointing. Goes
    when vLLM takes a transformers that has the newer name.
    """
    known = {field.name for field in dataclasses.fields(args_class)}
    return {key if key in known else _FORMER_NAMES.get(key, key): value for key, value in values.items()}


def plan_ranks(args_class: Any, ranks: int) -> Any:
    """Return TRL's class of arguments as it checks and fills them in where there are so many ranks.

    TRL 1.16's GRPOConfig multiplies by `world_size`, which transformers' TrainingArguments counts in the process that
    builds it (grpo_config.py, `__post_init__`): a process that is no rank would check groups of completions by 1. Goes
    when the number can be given.
    """
    return type(args_class.__name__, (args_class,), {"world_size": ranks})


def recomputes_activations(args: Any) -> bool:
    """Return whether a backward pass recomputes activations, by whichever name (see `name_args`)."""
    values = vars(args)
    return bool(values.get("activation_checkpointing", values.get("gradient_checkpointing")))


def keep_plain_weights() -> None:
    """Let vLLM's linear layers on CPUs compute with their parameters, not with packed copies of them.

    vLLM 0.31 packs each weight when a model is loaded (model_executor/layers/utils.py, dispatch_cpu_unquantized_gemm)
    and computes with the copy from then on: weights that are handed over later have no effect, and nothing is raised.
    Its callers import the function by name when they call it. Goes when a reload packs anew.
    """
    import torch
    import vllm.model_executor.layers.utils as layers

    packing = layers.dispatch_cpu_unquantized_gemm

    def plain(layer: Any, remove_weight: bool) -> None:
        if layer.weight.ndim == 2:
            layer.cpu_linear = torch.nn.functional.linear
        else:  # a convolution's, which its kernel wants packed
            packing(layer, remove_weight)

    layers.dispatch_cpu_unquantized_gemm = plain


def vary_seeds() -> None:
    """Let each copy of the model in a vLLM server draw numbers of its own.

    vLLM 0.31 seeds the workers of all data parallel ranks alike (`set_random_seed(self.model_config.seed)` in
    v1/worker/gpu_worker.py and cpu_worker.py) and deals the `n` completions of a prompt out to them: the first ones of
    two copies would be the same, which is no group to compare. TRL gives each of its own engines another seed. Goes
    when a rank's number is in its seed. Processes that are forked of one that has called it have it already.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    begin = WorkerBase.__init__
    if getattr(begin, _OWN_SEED, False):
        return

    @functools.wraps(begin)
    def begin_with_own_seed(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, vllm_config, *args, **kwargs)
        self.model_config.seed += vllm_config.parallel_config.data_parallel_index

    setattr(begin_with_own_seed, _OWN_SEED, True)
    WorkerBase.__init__ = begin_with_own_seed


_OWN_SEED = "posttrain_own_seed"


def load_to_numbered_cpus() -> None:
    """Let torch load to the device "cpu:0", which is what accelerate calls the CPU of each of several ranks.

    transformers 5.17, of the image with vLLM, loads the optimizer of a checkpoint to that device (trainer.py,
    `_load_optimizer_and_scheduler`), and torch 2.13 knows "cpu" alone. Goes when vLLM allows transformers 5.23, which
    asks for "cpu".
    """
    import torch

    torch.serialization.register_package(_AFTER_CPU, _no_tag, _load_to_cpu)


_AFTER_CPU = 11
"""The rank that torch.serialization asks this in: its own for "cpu" has 10."""


def _no_tag(storage: Any) -> None:
    """Leave the name of the device in what is saved to others."""


def _load_to_cpu(storage: Any, location: str) -> Any:
    return storage if location.startswith("cpu:") else None


def assume_cpus() -> None:
    """Let vLLM take a machine without GPUs for one with CPUs, where its build for GPUs else takes it for none.

    Without a platform vLLM 0.31 cannot even make its parser (config/device.py, "Failed to infer device type"): the
    defaults depend on it, which options there are does not. It helps itself so for `vllm bench`
    (entrypoints/cli/main.py). Goes when `vllm serve --help` works there. For processes that start no engine.
    """
    from vllm import platforms

    if platforms.current_platform.is_unspecified():
        from vllm.platforms.cpu import CpuPlatform

        platforms.current_platform = CpuPlatform()


def long_options(parser: Any) -> list[str]:
    """Return the long options of an argparse parser without their hyphens; argparse has no public list of them."""
    return [name.removeprefix("--") for name in parser._option_string_actions if name.startswith("--")]


def use_rollout_client() -> None:
    """Let TRL's trainers speak with their vLLM servers through our client.

    TRL 1.16 names its own class in VLLMGeneration._init_vllm (generation/vllm_generation.py:302) and knows one server.
    Goes when a trainer takes a client.
    """
    import trl.generation.vllm_generation as generation

    from posttrain_workloads.rollout_client import RolloutClient

    generation.VLLMClient = RolloutClient


def use_colocated_engine(*, dtype: str, eager: bool) -> None:
    """Let TRL's trainers make the engine inside them in this dtype, the trained model's, and compiled or not.

    TRL 1.16 passes no dtype (generation/vllm_generation.py:347), and vLLM makes bfloat16 of a model in float32. Without
    multiprocessing the engine is in the rank itself, where TRL looks for its weights. Goes when TRL passes its
    model_init_kwargs on.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import trl.generation.vllm_generation as generation
    from vllm import LLM

    generation.LLM = partial(LLM, dtype=dtype, enforce_eager=eager)


def copy_as_they_are(named_params: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield each tensor as it is at its turn, for who collects several of them before any is sent.

    vLLM 0.31 collects up to 1 GiB of references (distributed/weight_transfer/packed_tensor.py, pack_tensors), and looks
    at them when it has asked TRL for one more. After the last one TRL 1.16 takes LoRA's adapters out of the weights
    again (generation/vllm_generation.py, _iter_named_params), in place: servers would get the model without adapters.
    Costs 1 GiB of the GPU. Goes when either of the two copies.
    """
    for name, weight in named_params:
        yield name, weight.detach().clone()


def _file(folder: Path, rank: int) -> Path:
    return folder / f"logging_state_{rank}.json"
