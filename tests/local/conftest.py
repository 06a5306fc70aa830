"""What tests of a local cluster share: the cluster, and where its programs leave their process ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from posttrain.local.cluster import LocalCluster
from tests.support.local_cluster import open_cluster


@pytest.fixture
def pids(tmp_path: Path) -> Path:
    """Where programs leave their process ids."""
    (tmp_path / "pids").mkdir()
    return tmp_path / "pids"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    with closing(open_cluster(tmp_path / "demo")) as cluster:
        yield cluster
