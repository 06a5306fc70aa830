"""A test cluster to try things on: `python -m tests.cluster up|down|parts`.

It owns the one cluster below .dev/, which outlives the command; it must not be needed by any test.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

from posttrain.local.container import ProcessId
from posttrain.local.shim import start_ticks
from tests.cluster.cluster import TestCluster
from tests.cluster.components import KUBERNETES, PARTS, ROOT, program, why_not
from tests.cluster.errors import ClusterError
from tests.cluster.processes import end_leftovers, poll

DEV = ROOT / ".dev"
FOLDER = DEV / "cluster"
KUBECONFIG = DEV / "kubeconfig"
_RECORD = DEV / "cluster.json"
_LOG = DEV / "cluster.log"
_FAKE_NODES = 4
_STOP_SECONDS = 120.0
_UP = "up"


def up() -> int:
    """Start the cluster in the background, unless it runs, and say how to use it."""
    if _running() is None:
        DEV.mkdir(exist_ok=True)
        with _LOG.open("wb") as log:
            serving = subprocess.Popen(
                [sys.executable, "-m", "tests.cluster", "serve"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                start_new_session=True,
            )
        assert serving.stdout is not None
        if serving.stdout.readline().decode().strip() != _UP:
            print(_LOG.read_text(), file=sys.stderr, end="")
            return 1
        print(f"started a control plane, the training operator, KWOK and {_FAKE_NODES} played nodes below {FOLDER}")
    else:
        print(f"the cluster below {FOLDER} runs already")
    print(f"    export KUBECONFIG={KUBECONFIG}")
    print(f"    {program(KUBERNETES, 'kubectl')} get nodes")
    print("stop it with `make cluster-down`; it does not outlive this machine's next start")
    return 0


def serve() -> int:
    """Run the cluster until SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    _RECORD.write_text(json.dumps([os.getpid(), start_ticks(os.getpid())]))
    try:
        with TestCluster.start(FOLDER) as cluster:
            cluster.add_fake_nodes(_FAKE_NODES)
            KUBECONFIG.unlink(missing_ok=True)
            KUBECONFIG.symlink_to(cluster.kubeconfig)
            print(_UP, flush=True)
            signal.sigwait({signal.SIGTERM, signal.SIGINT})
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        _RECORD.unlink()
    return 0


def down() -> int:
    """Stop the cluster, and whatever an earlier one left."""
    if (running := _running()) is not None:
        with suppress(ProcessLookupError):
            os.kill(running.pid, signal.SIGTERM)
        poll(lambda: not running.is_alive(), what="the cluster to stop", seconds=_STOP_SECONDS)
    end_leftovers(FOLDER)
    KUBECONFIG.unlink(missing_ok=True)
    print(f"no cluster runs; its logs are in {FOLDER / 'logs'}")
    return 0


def parts() -> int:
    """Print the parts that can be run here, as $POSTTRAIN_REQUIRE wants them."""
    print(",".join(part for part in PARTS if why_not(part) is None))
    return 0


def _running() -> ProcessId | None:
    if not _RECORD.exists():
        return None
    pid, ticks = json.loads(_RECORD.read_text())
    process = ProcessId(pid=pid, start_ticks=ticks)
    return process if process.is_alive() else None


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says."""
    commands = {"up": up, "down": down, "serve": serve, "parts": parts}
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument("command", choices=commands)
    args = parser.parse_args(argv)
    try:
        return commands[args.command]()
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
