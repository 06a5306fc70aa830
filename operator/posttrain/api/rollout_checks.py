"""What is wrong with `spec.grpo.rollout`: arguments that its mode does not read, and what vLLM cannot do for a run.

It owns these problems and their wording; it must not look at what the machine has, nor judge other arguments.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress

from posttrain.api.grpo import Grpo
from posttrain.api.methods import Path, args_path, table_of
from posttrain.api.servers import RolloutServers, find_option_problems
from posttrain.api.spelling import join_names
from posttrain.api.training_run import TrainingRunSpec

_ARGS = args_path("grpo")
_MODE = "spec.grpo.rollout.mode"
_VLLM = "vllm_"
_SERVER = ("spec", "grpo", "rollout", "server")
_OF_ENGINE = {
    "vllm_enable_sleep_mode": "leave it out",
    "vllm_gpu_memory_utilization": "write gpu-memory-utilization into spec.grpo.rollout.server.args",
    "vllm_max_model_length": "write spec.grpo.rollout.server.maxModelLength",
    "vllm_model_impl": "write model-impl into spec.grpo.rollout.server.args",
    "vllm_tensor_parallel_size": "write spec.grpo.rollout.server.tensorParallelSize",
}
_OF_TRANSFORMERS = (
    "cache_implementation",
    "transformers_continuous_batching_config",
    "use_transformers_continuous_batching",
    "use_transformers_paged",
)
_NO_SEED = (None, -1)
"""What vLLM takes for none (vllm/sampling_params.py)."""


def find_rollout_problems(spec: TrainingRunSpec) -> list[tuple[Path, str]]:
    """Return path and message of every problem; none for a run of another method. The `args` must be without any."""
    grpo = spec.grpo
    if grpo is None:
        return []
    if grpo.rollout.mode == "Transformers":
        message = (
            "is for rollouts by vLLM, and this run's are by transformers: "
            f"write {_MODE}: Colocate, or leave the key out"
        )
        return [*(((*_ARGS, key), message) for key in grpo.args if key.startswith(_VLLM)), *_seed(grpo)]
    servers = spec.rollout_servers
    where = _engine(spec, grpo) if servers is None else _servers(spec, grpo, servers)
    return [*_unread(grpo), *_vespo(grpo), *_seed(grpo), *_model(spec), *where]


def _unread(grpo: Grpo) -> Iterator[tuple[Path, str]]:
    for key in grpo.args:
        if key in _OF_TRANSFORMERS:
            yield (*_ARGS, key), "is for rollouts by transformers, and this run's are by vLLM: leave it out"


def _vespo(grpo: Grpo) -> Iterator[tuple[Path, str]]:
    """TRL refuses it when the trainer is built (trl/trainer/grpo_trainer.py)."""
    mode = "vllm_importance_sampling_mode"
    corrects = _value(grpo, "vllm_importance_sampling_correction")
    if grpo.args.get("loss_type") == "vespo" and corrects and not str(_value(grpo, mode)).startswith("token_"):
        message = "loss_type vespo weighs single tokens: write vllm_importance_sampling_mode: token_truncate or "
        yield (*_ARGS, mode), f"{message}token_mask"


def _seed(grpo: Grpo) -> Iterator[tuple[Path, str]]:
    """A seed of a generation, which vLLM makes a different one for each completion only where it is asked for several.

    That is in Server mode, without a function that asks for the completions itself (trl/generation/vllm_generation.py;
    vllm/v1/engine/parallel_sampling.py).
    """
    given = grpo.args.get("generation_kwargs")
    if isinstance(given, str):
        with suppress(ValueError):  # of which the real class says why
            given = json.loads(given)
    if not isinstance(given, dict) or given.get("seed") in _NO_SEED:
        return
    of_one = (
        "vLLM is asked for single completions, each time with this seed, and would draw all those of a prompt with "
    )
    of_one += "the same random numbers: "
    match grpo.rollout.mode:
        case "Transformers":
            message = "does nothing, as transformers has no seed for a generation: leave it out, and write "
            message += "spec.grpo.args.seed"
        case "Colocate":
            message = f"{of_one}leave it out, an engine inside the trainer has one of its own"
        case "Server" if grpo.rollout_function is not None:
            message = f"{of_one}leave it out; servers take one as seed in spec.grpo.rollout.server.args"
        case _:
            return
    yield (*_ARGS, "generation_kwargs", "seed"), message


def _model(spec: TrainingRunSpec) -> Iterator[tuple[Path, str]]:
    if spec.model.config:
        message = (
            "vLLM reads the model from its own config.json, so it would generate with another model than the trained "
            f"one: write the overrides into that file, or {_MODE}: Transformers"
        )
        yield ("spec", "model", "config"), message
    if spec.peft is not None and spec.peft.method == "QLoRA":
        message = f"weights in 4 bits are not handed over to vLLM: write LoRA, or {_MODE}: Transformers"
        yield ("spec", "peft", "method"), message


def _engine(spec: TrainingRunSpec, grpo: Grpo) -> Iterator[tuple[Path, str]]:
    """What an engine inside the trainer cannot do."""
    world_size, on_cpus = spec.resources.world_size, not spec.resources.gpus_per_node
    size = _value(grpo, "vllm_tensor_parallel_size")
    if isinstance(size, int) and (size < 1 or world_size % size):
        message = f"{size} does not divide the {world_size} ranks, and an engine spans whole groups of them"
        yield (*_ARGS, "vllm_tensor_parallel_size"), f"{message}: write a divisor of {world_size}"
    elif on_cpus and size != 1:
        message = "an engine spans several GPUs, and spec.resources.gpusPerNode is 0: leave it out"
        yield (*_ARGS, "vllm_tensor_parallel_size"), message
    if on_cpus and _value(grpo, "vllm_enable_sleep_mode"):
        message = "frees a GPU's memory, and spec.resources.gpusPerNode is 0: leave it out"
        yield (*_ARGS, "vllm_enable_sleep_mode"), message
    share = _value(grpo, "vllm_gpu_memory_utilization")
    if isinstance(share, int | float) and not 0 < share <= 1:
        message = f"{share:g} is no share of a GPU's memory: write a number above 0, and at most 1"
        yield (*_ARGS, "vllm_gpu_memory_utilization"), message


def _servers(spec: TrainingRunSpec, grpo: Grpo, servers: RolloutServers) -> Iterator[tuple[Path, str]]:
    """What servers cannot do, and arguments that an engine inside the trainer would read."""
    for key in grpo.args:
        if key in _OF_ENGINE:
            yield (*_ARGS, key), f"is for an engine inside the trainer, and this run has servers: {_OF_ENGINE[key]}"
    for option, message in find_option_problems(servers):
        yield (*_SERVER, "args", option), message
    if bool(spec.server_gpus) != bool(spec.resources.gpus_per_node):
        message = (
            f"is {spec.server_gpus}, and spec.resources.gpusPerNode is {spec.resources.gpus_per_node}: weights "
            "travel from GPU to GPU, or from CPU to CPU"
        )
        yield (*_SERVER, "gpusPerNode"), message
    yield from _parallel_servers(spec, servers)


def _parallel_servers(spec: TrainingRunSpec, servers: RolloutServers) -> Iterator[tuple[Path, str]]:
    """Copies and parts of the model that a server has no place for."""
    size, copies, nodes = spec.server_engine_size, servers.data_parallel_size, servers.nodes_per_replica
    gpus = spec.server_gpus * nodes
    if copies > 1 and nodes > 1:
        message = f"is {copies}, and a server of {nodes} nodes has one copy: leave it out, and write replicas"
        yield (*_SERVER, "dataParallelSize"), message
    elif gpus and copies > gpus:
        yield (*_SERVER, "dataParallelSize"), f"is {copies}, and a server has {gpus} GPUs: write at most {gpus}"
    elif gpus and size * copies > gpus:
        of_each = f" for {copies} copies of the model" if copies > 1 else ""
        message = f"is {size}, and a server has {gpus} GPUs{of_each}: write at most {gpus // copies}"
        yield (*_SERVER, "tensorParallelSize"), message
    elif size % nodes:
        message = f"is {size}, and each of a server's {nodes} nodes has as large a part: write a multiple of {nodes}"
        yield (*_SERVER, "tensorParallelSize"), message
    elif size * copies < gpus:
        yield _idle(servers, size=size, gpus=gpus)


def _idle(servers: RolloutServers, *, size: int, gpus: int) -> tuple[Path, str]:
    """Say that a server would hold GPUs that no process of it uses, and what uses all of them."""
    copies, nodes = servers.data_parallel_size, servers.nodes_per_replica
    used = size * copies
    ways = []
    if servers.tensor_parallel_size is None:
        key, is_now = "dataParallelSize", f"is {copies}"
        ways.append(f"dataParallelSize: {next(n for n in range(copies, gpus + 1) if gpus % n == 0)}")
    else:
        key, is_now = "tensorParallelSize", f"is {size}" + (f" for each of {copies} copies of the model" * (copies > 1))
        if gpus % copies == 0:
            ways.append(f"tensorParallelSize: {gpus // copies}")
        if nodes == 1 and gpus % size == 0:
            ways.append(f"dataParallelSize: {gpus // size}")
    ways.append(f"gpusPerNode: {used // nodes}")
    idle = f"{gpus - used} of a server's {gpus} GPUs would idle"
    return (*_SERVER, key), f"{is_now}, and {idle}: write {join_names(ways, conjunction='or')}"


def _value(grpo: Grpo, key: str) -> object:
    return grpo.args.get(key, table_of("grpo").keys[key].default)
