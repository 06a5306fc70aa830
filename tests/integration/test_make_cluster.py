"""The cluster that `make cluster` starts: it outlives the command, and `make cluster-down` ends it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.local.shim import descendants
from tests.cluster.__main__ import Place
from tests.cluster.components import KUBERNETES, program
from tests.support.processes import is_alive
from tests.support.tiers import require

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


def call(*args: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tests.cluster", *map(str, args)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)


def run(*args: str | Path) -> str:
    done = call(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_cluster_is_started_once_and_stopped(tmp_path: Path) -> None:
    require("control-plane")
    place = Place(tmp_path)
    here = ("--folder", tmp_path)

    assert "started below" in run("up", "--shape", "fake", *here)
    owner = place.running()
    assert owner is not None
    pids = [owner.pid, *descendants(owner.pid)]
    assert "runs already" in run("up", "--shape", "fake", *here)
    without = call("up", "--quickstart", *here)
    assert (without.returncode, without.stdout) == (1, "")
    assert "runs without the quickstart: `make cluster-down` first" in without.stderr
    get_nodes = [program(KUBERNETES, "kubectl"), "--kubeconfig", place.kubeconfig, "get", "nodes", "--output", "name"]
    nodes = subprocess.run(get_nodes, capture_output=True, text=True, check=True).stdout.split()
    assert nodes == [f"node/fake-{number}" for number in range(4)]

    assert "no cluster runs" in run("down", *here)

    assert not any(map(is_alive, pids))
    assert place.running() is None
    assert "no cluster runs" in run("down", *here)
