"""vLLM's plugins of ours: each of its processes finds them by their entry points and calls them when it starts.

It owns that any server says why it ended and draws numbers of its own, and what one on CPUs needs so that weights can
be handed over to it; on GPUs vLLM has that itself, and two of them do nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

from posttrain.contract import environment
from posttrain_workloads import _compat
from posttrain_workloads.last_words import leave_last_words

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


def vary_seeds() -> None:
    """Let the copies of the model in a server complete a prompt differently."""
    _compat.vary_seeds()


def tell_the_cause() -> None:
    """Let a server of ours leave its container's message; with vLLM inside a trainer that is the trainer's."""
    if environment.LISTEN in os.environ and environment.TERMINATION in os.environ:
        leave_last_words(Path(os.environ[environment.TERMINATION]))


def _on_cpus() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
