"""How weights reach a vLLM server on a machine without GPUs: a group of processes over gloo.

It owns the group, which the trainer opens as rank 0 and every worker of every server joins, and the server's end of it;
it must not speak HTTP, nor know how many servers there are. On GPUs vLLM's own NCCL engine does this.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, TCPStore
from vllm.distributed.utils import init_gloo_process_group
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

JOIN_SECONDS = 120.0
"""How long each member waits for the others when the group is opened."""
BROADCAST_SECONDS = 600.0
"""How long a member waits for one tensor."""


class GlooGroup:
    """One trainer, rank 0, and the workers of its servers."""

    def __init__(self, *, address: str, port: int, rank: int, world_size: int) -> None:
        # Rank 0 holds the store, and waits for the others; it is closed with the group.
        store = TCPStore(address, port, world_size, rank == 0, timedelta(seconds=JOIN_SECONDS))
        self._group = init_gloo_process_group(
            prefix_store=PrefixStore("weights", store),
            group_rank=rank,
            group_size=world_size,
            timeout=timedelta(seconds=BROADCAST_SECONDS),
        )

    def broadcast(self, tensor: torch.Tensor) -> Any:
        """Begin to send (rank 0) or to receive one tensor; return torch's work object, to wait for."""
        return self._group.broadcast(tensor, 0)


class GlooWeightTransferEngine(NCCLWeightTransferEngine):  # type: ignore[misc]
    """A worker's end. What it inherits: the forms of the requests, and how new weights are put into the model."""

    def init_transfer_engine(self, init_info: Any) -> None:
        """Join a trainer's group, and leave the one of a trainer or a group before."""
        self.shutdown()
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.model_update_group = GlooGroup(
            address=init_info.master_address, port=init_info.master_port, rank=rank, world_size=init_info.world_size
        )

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive weights. The inherited method waits for an accelerator at the end, which is not there."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Any) -> None:
        """Receive every announced tensor, in the order of the announcement, and load it."""
        if self.model_update_group is None:
            raise RuntimeError("no trainer has opened a group: call init_weight_transfer_engine first")
        self.model.load_weights(self._receive(update_info))

    def _receive(self, update_info: Any) -> Iterator[tuple[str, torch.Tensor]]:
        announced = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        for name, dtype, shape in announced:
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self.model_update_group.broadcast(weight).wait()
            yield name, weight
