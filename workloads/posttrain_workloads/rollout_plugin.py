"""vLLM's plugins of ours: each of its processes finds them by their entry points and calls them when it starts.

It owns what a vLLM server on CPUs needs so that weights can be handed over to it; on GPUs vLLM has all that itself, and
both do nothing.
"""

from __future__ import annotations

from posttrain_workloads import _compat

GLOO = "gloo"
"""The back-end's name in --weight-transfer-config."""


def register_gloo() -> None:
    """Let a server on CPUs take weights over gloo: --weight-transfer-config '{"backend": "gloo"}'."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if _on_cpus():
        WeightTransferEngineFactory.register_engine(
            GLOO, "posttrain_workloads.rollout_engine", "GlooWeightTransferEngine"
        )


def keep_plain_weights() -> None:
    """Let a server on CPUs compute with the weights that it was handed over last."""
    if _on_cpus():
        _compat.keep_plain_weights()


def _on_cpus() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
