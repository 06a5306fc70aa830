"""A rollout server: vLLM, in the trainer's version, with what handing weights over takes.

    python -m posttrain_workloads.serve

It owns the options of `vllm serve`, which this process then becomes, unless the server has several nodes; it must not
import torch before that.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from posttrain.api.servers import RolloutServers
from posttrain.contract import environment
from posttrain.contract.config import TrainingConfig
from posttrain_workloads.arguments import training_args
from posttrain_workloads.model import model_folder
from posttrain_workloads.rollout_modes import vllm_environment
from posttrain_workloads.rollout_plugin import GLOO
from posttrain_workloads.serve_nodes import Place, serve_together

_VLLM = ("-m", "vllm.entrypoints.cli.main", "serve")
_KEEP_ALIVE_SECONDS = 7200
"""How long a connection may be idle while the trainer trains; vLLM would close it after 5 s, and what is sent at that
moment is lost."""


def main() -> None:
    """Become the server that the environment names, or a node of it."""
    config = TrainingConfig.from_json(Path(os.environ[environment.CONFIG]).read_text())
    host, _, port = os.environ[environment.LISTEN].rpartition(":")
    folder = model_folder(config, environ=os.environ)
    options = serve_options(config, folder=folder, environ=os.environ)
    environ = serve_environment(config, environ=os.environ)
    argv = [sys.executable, *_VLLM, str(folder), "--host", host, "--port", port, *options]
    servers = config.spec.rollout_servers
    assert servers is not None
    if servers.nodes_per_replica == 1:
        os.execve(sys.executable, argv, environ)
    place = Place.of_pod(
        environ[environment.POD_NAME],
        nodes=servers.nodes_per_replica,
        meetings=environ[environment.SERVER_NODES],
    )
    key = environ[environment.ROLLOUT_KEY]
    sys.exit(serve_together(argv, place=place, listen=(host, int(port)), key=key, environ=environ))


def serve_environment(config: TrainingConfig, *, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of vLLM: the container's, and where it has none, ours."""
    variables = {
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(_KEEP_ALIVE_SECONDS),
        **vllm_environment(config),
        **environ,
        "VLLM_SERVER_DEV_MODE": "1",  # the paths by which weights are handed over exist in this mode alone
    }
    if config.gang.gpus_per_node == 0:
        variables["CUDA_VISIBLE_DEVICES"] = ""  # a container without a GPU may still see the node's
    return variables


def serve_options(config: TrainingConfig, *, folder: Path, environ: Mapping[str, str]) -> list[str]:
    """Return the options of `vllm serve` but for where it listens: the user's, and those that posttrain sets."""
    servers = config.spec.rollout_servers
    assert servers is not None
    on_cpus = config.spec.server_gpus == 0
    backend = GLOO if on_cpus else "nccl"
    options = [
        *("--dtype", serve_dtype(config, read_shape=partial(_read_shape, folder), environ=environ)),
        *("--tensor-parallel-size", str(config.spec.server_engine_size)),
        *("--data-parallel-size", str(servers.data_parallel_size)),
        *("--seed", str(_seed(servers, environ=environ))),
        *("--weight-transfer-config", json.dumps({"backend": backend})),
        *("--logprobs-mode", "processed_logprobs"),
        *("--max-logprobs", "-1"),
    ]
    if servers.max_model_length is not None:
        options += ["--max-model-len", str(servers.max_model_length)]
    if config.spec.model.trust_remote_code:
        options.append("--trust-remote-code")
    if on_cpus and not {"enforce-eager", "no-enforce-eager"} & servers.args.keys():
        options.append("--enforce-eager")  # compiling takes minutes there
    for name, value in servers.args.items():
        if name != "seed":
            options += write_option(name, value)
    return options


def _seed(servers: RolloutServers, *, environ: Mapping[str, str]) -> int:
    """Return the seed of a server's first copy of the model; each further copy adds one, by a plugin of ours."""
    server = int(environ[environment.POD_NAME].rpartition("-")[2]) // servers.nodes_per_replica
    given = servers.args.get("seed", 0)
    assert isinstance(given, int)  # else the run was refused
    return given + server * servers.data_parallel_size


def _read_shape(folder: Path) -> Mapping[str, Any]:
    shape: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return shape


def serve_dtype(
    config: TrainingConfig, *, read_shape: Callable[[], Mapping[str, Any]], environ: Mapping[str, str]
) -> str:
    """Return the type that the trainer computes in, as it follows from its arguments and the model's config.json."""
    args = training_args(config, environ=environ)
    half = bool(args.get("fp16"))
    whole = args.get("bf16")
    if whole or (whole is None and not half):  # TRL's own default
        return "bfloat16"
    if half:
        return "float16"
    if config.spec.model.dtype != "auto":
        return str(config.spec.model.dtype)
    if config.gang.gpus_per_node == 0:
        return "float32"
    shape = read_shape()
    return str(shape.get("dtype") or shape.get("torch_dtype") or "float32")


def write_option(name: str, value: JsonValue) -> Iterator[str]:
    """Yield an option as the command line has it; true stands for one without a value."""
    yield f"--{name}"
    if value is not True:
        for item in value if isinstance(value, list) else [value]:
            yield item if isinstance(item, str) else json.dumps(item)


if __name__ == "__main__":
    main()
