"""A trainer that looks, after each rollout, at what its servers or its engine answer and what its model would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from greedy import colocated, equal, greedy
from trl import GRPOTrainer


class ComparingTrainer(GRPOTrainer):
    """Writes a line for each rollout of each rank into a file of the rank, in the run's storage."""

    def _generate(self, prompts: list[Any]) -> Any:
        output = super()._generate(prompts)
        client = getattr(self.vllm_generation, "vllm_client", None)
        seen: dict[str, Any] = {"step": self.state.global_step, "client": client is not None, "equal": []}
        wanted = greedy(self.accelerator.unwrap_model(self.model))
        if client is not None:
            # Before the comparison, which asks each server by itself and leaves no trace in the client.
            seen["servers"] = [origin.server for origin in client.origins]
            seen["weights"] = [origin.weights for origin in client.origins]
            seen["has"] = [server.weight_version() for server in client.servers]
            seen["equal"] = equal(client, wanted)
        elif self.vllm_mode == "colocate":
            seen["equal"] = [colocated(self.vllm_generation.llm) == wanted]
        with (Path(self.args.output_dir) / f"rollouts-of-rank-{self.accelerator.process_index}.jsonl").open("a") as out:
            out.write(json.dumps(seen) + "\n")
        return output
