"""The shape of vLLM servers that a run has beside its gang, and the options of theirs that posttrain sets itself.

It owns what the fields under `rollout.server` mean; it must not know how a server is started, nor what vLLM knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic import Field

from posttrain.api.base import ApiModel, JsonObject, Quantity
from posttrain.api.spelling import describe_value

OPTION = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
"""A long option of `vllm serve`, without its hyphens in front."""
_LIKE_OPTION = re.compile(r"-(-|[A-Za-z])")

_ADDRESS = "posttrain gives every server its address"
_ONE_EACH = "vLLM starts one for each copy of the model"
_TRUST = "posttrain makes a key, and says who may reach the servers"
_MODEL = "it follows from spec.model"
_COPIES = "write spec.grpo.rollout.server.dataParallelSize"
_NODES = "write spec.grpo.rollout.server.nodesPerReplica"
_OVER_GPUS = "write spec.grpo.rollout.server.tensorParallelSize"
_PLAIN = "the weights that are handed over are not quantized"
_HAND_OVER = "handing weights over depends on it"
_SEED, _SEED_MAX = "seed", 2**31 - 1
"""vLLM seeds NumPy with it, which takes nothing below 0 nor above 2**32 - 1."""
OWNED_OPTIONS = {
    "api-key": _TRUST,
    "api-server-count": _ONE_EACH,
    "code-revision": _MODEL,
    "config": "write its options here",
    "data-parallel-external-lb": _COPIES,
    "data-parallel-hybrid-lb": _COPIES,
    "data-parallel-multi-port-external-lb": _COPIES,
    "data-parallel-rank": _COPIES,
    "data-parallel-size": _COPIES,
    "data-parallel-size-local": _COPIES,
    "data-parallel-start-rank": _COPIES,
    "decode-context-parallel-size": _OVER_GPUS,
    "device-ids": "write spec.grpo.rollout.server.gpusPerNode",
    "dtype": "it is the type that the trainer computes in: write spec.model.dtype",
    "grpc": _HAND_OVER,
    "headless": _NODES,
    "hf-config-path": _MODEL,
    "hf-overrides": _MODEL,
    "hf-token": "write spec.access.hubTokenSecretRef: a token in a resource can be read by everybody who sees it",
    "host": _ADDRESS,
    "logprobs-mode": _HAND_OVER,
    "max-logprobs": _HAND_OVER,
    "max-model-len": "write spec.grpo.rollout.server.maxModelLength",
    "model": _MODEL,
    "nnodes": _NODES,
    "node-rank": _NODES,
    "pipeline-parallel-size": _OVER_GPUS,
    "port": _ADDRESS,
    "prefill-context-parallel-size": _OVER_GPUS,
    "quantization": _PLAIN,
    "quantization-config": _PLAIN,
    "revision": _MODEL,
    "root-path": _ADDRESS,
    "served-model-name": _ADDRESS,
    "ssl-certfile": _TRUST,
    "ssl-keyfile": _TRUST,
    "tensor-parallel-size": _OVER_GPUS,
    "tokenizer": _MODEL,
    "tokenizer-revision": _MODEL,
    "trust-remote-code": "write spec.model.trustRemoteCode",
    "uds": _ADDRESS,
    "weight-transfer-config": _HAND_OVER,
}
"""Options that are set by posttrain. The value completes "is set by posttrain: ..."."""


class RolloutServers(ApiModel):
    """vLLM servers, each of which generates a share of the completions."""

    replicas: int = Field(default=1, ge=1, le=64, description="Number of servers. Default: 1.", examples=[2])
    nodes_per_replica: int = Field(
        default=1,
        ge=1,
        le=16,
        description="Nodes that each server spans, one pod each. Default: 1.",
        examples=[2],
    )
    gpus_per_node: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="GPUs of a server on each of its nodes. Default: 1, or 0 where the gang has none.",
        examples=[4],
    )
    tensor_parallel_size: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="GPUs that a model of a server is split over, or processes where it has no GPU. Default: all of "
        "the server's GPUs, divided by dataParallelSize, or one process a node.",
        examples=[4],
    )
    data_parallel_size: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Copies of the model in a server, each on GPUs of its own: they share the server's prompts. "
        "Default: 1.",
        examples=[2],
    )
    max_model_length: int | None = Field(
        default=None,
        ge=1,
        le=100_000_000,
        description="Tokens of prompt and completion together. Default: as many as the model sees.",
        examples=[4096],
    )
    cpu: Quantity | None = Field(
        default=None, description="CPUs of each pod of a server. Default: the profile's.", examples=["8"]
    )
    memory: Quantity | None = Field(
        default=None, description="Memory of each pod of a server. Default: the profile's.", examples=["64Gi"]
    )
    args: JsonObject = Field(
        default={},
        max_length=64,
        description="Options of `vllm serve`, by their long names without hyphens in front; true for one without a "
        "value. Those that posttrain sets itself are refused. Default: none.",
        examples=[{"gpu-memory-utilization": 0.9, "enforce-eager": True}],
    )

    @property
    def pods(self) -> int:
        """Pods of all servers together."""
        return self.replicas * self.nodes_per_replica


def find_option_problems(servers: RolloutServers) -> Iterator[tuple[str, str]]:
    """Yield each option that cannot be, and what to change; whether vLLM knows it, only its image can tell."""
    for name, value in servers.args.items():
        owned = OWNED_OPTIONS.get(name) or OWNED_OPTIONS.get(name.removeprefix("no-"))
        if not OPTION.fullmatch(name):
            near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
            yield name, f"is no long option of vLLM: write `{near}`, without hyphens in front and in lower case"
        elif owned is not None:
            yield name, f"is set by posttrain: {owned}"
        elif value is None or value is False:
            yield name, f"an option that is not wanted is left out; one that is turned off is called no-{name}"
        elif name == _SEED and not (type(value) is int and 0 <= value <= _SEED_MAX):
            told = "each server adds its number to the seed, which has to be an integer"
            yield name, f"{told} from 0 to {_SEED_MAX:,}, not {describe_value(value)}"
        else:
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, str) and _LIKE_OPTION.match(item):
                    yield name, f"{item} would be read as another option: write that one as a key of its own"
