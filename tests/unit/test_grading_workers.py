"""How many processes grade: of what the container may use, not of what the node has."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from posttrain_workloads.rewards.grading import default_workers, processor_limit

FILES: list[tuple[dict[str, str], float]] = [
    ({}, math.inf),
    ({"cpu.max": "max 100000\n"}, math.inf),
    ({"cpu.max": "250000 100000\n"}, 2.5),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
    ({"cpu/cpu.cfs_quota_us": "800000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8.0),
]


@pytest.mark.parametrize(("files", "limit"), FILES)
def test_a_containers_limit_is_read_from_its_control_groups(
    files: dict[str, str], limit: float, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert processor_limit(tmp_path) == limit


def test_the_ranks_of_a_node_share_what_they_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(192)))
    limits = {1: 16.0, 8: 16.5, 32: 16.0, 4: math.inf}
    workers = {}
    for ranks, limit in limits.items():
        monkeypatch.setattr("posttrain_workloads.rewards.grading.processor_limit", lambda _, limit=limit: limit)
        workers[ranks] = default_workers({"LOCAL_WORLD_SIZE": str(ranks)})
    assert workers == {1: 16, 8: 2, 32: 1, 4: 48}
