"""The differences between vLLM's log-probabilities and the trainer's are added up by their servers, in torch."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.workloads._configs import ROOT

pytestmark = pytest.mark.workloads

SCRIPT = """
import json, math, sys
import torch
from posttrain_workloads.rollout_differences import sum_differences

output = {
    "completion_ids": torch.tensor([[5, 6, 2], [7, 8, 9], [4, 0, 0], [3, 3, 3]]),
    "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 0], [1, 1, 1]]),
    "tool_mask": torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 1, 1]]),
    "old_per_token_logps": torch.zeros(4, 3),
    "sampling_per_token_logps": torch.tensor([[-1.0, 2, 4], [8, 16, 32], [64, 128, 256], [512, math.nan, 1024]]),
}
turns = [[5, 6], [7, 8, 9], [4], [1, 1]]
told = sum_differences(output, turns, [0, 1, 1, 0], sources=3).tolist()
del output["tool_mask"]
json.dump([told, sum_differences(output, [], [], sources=1).tolist()], sys.stdout)
"""


def test_tokens_count_for_their_server_where_the_model_wrote_them_and_vllm_scored_them(trainer_python: Path) -> None:
    done = subprocess.run(
        [trainer_python, "-c", SCRIPT],
        env={"PYTHONPATH": f"{ROOT / 'operator'}:{ROOT / 'workloads'}"},
        capture_output=True,
        text=True,
        check=True,
    )

    one_rank, without_tools = json.loads(done.stdout)
    # The last completion goes on from no turn: it counts in the mean of all alone.
    assert one_rank == [[3, 2], [8 + 32 + 64, 3], [0, 0], [7 + 40 + 64 + 1536, 3 + 2 + 1 + 2]]
    assert without_tools == [[0, 0], [7 + 56 + 64 + 1536, 3 + 3 + 1 + 2]]
