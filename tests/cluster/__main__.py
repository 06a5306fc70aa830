"""A test cluster to try things on: `python -m tests.cluster up|down|parts|packages`.

It owns a cluster below .dev/ that outlives the command; no fixture of a test may need it.
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
from pathlib import Path
from types import FrameType

from posttrain.local.container import ProcessId
from posttrain.local.shim import start_ticks
from tests.cluster.cluster import TestCluster
from tests.cluster.components import HELM, KUBERNETES, PARTS, ROOT, program, why_not
from tests.cluster.control_plane import NODE_NAME
from tests.cluster.errors import ClusterError
from tests.cluster.processes import end_leftovers, poll
from tests.cluster.requirements import missing_packages
from tests.support.release import NAMESPACE, add_storage, load_images, start_node, write_values

_FAKE_NODES = 4
_STOP_SECONDS = 120.0
_UP = "up"
_QUICKSTART = ROOT / "examples" / "quickstart"


class Place:
    """Where a cluster lies that outlives the command, and which process has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cluster = folder / "cluster"
        self.kubeconfig = folder / "kubeconfig"
        self.log = folder / "cluster.log"
        self.record = folder / "cluster.json"
        self.values = folder / "values.yaml"

    def running(self) -> ProcessId | None:
        """Return the process that has the cluster, if it is alive."""
        if not self.record.exists():
            return None
        pid, ticks = json.loads(self.record.read_text())
        process = ProcessId(pid=pid, start_ticks=ticks)
        return process if process.is_alive() else None


def up(options: argparse.Namespace) -> int:
    """Start the cluster in the background, unless it runs, and say how to use it."""
    place = Place(options.folder)
    if place.running() is None:
        place.folder.mkdir(parents=True, exist_ok=True)
        shape = "node" if options.quickstart else options.shape or _best_shape()
        if options.quickstart:
            if reason := why_not("node"):
                raise ClusterError(f"the quickstart needs a real node: {reason}")
            subprocess.run([sys.executable, _QUICKSTART / "make_inputs.py"], check=True)
        arguments = ["serve", "--folder", str(place.folder), "--shape", shape]
        arguments += [f"--{name}" for name in ("kueue", "quickstart") if getattr(options, name)]
        with place.log.open("wb") as log:
            serving = subprocess.Popen(
                [sys.executable, "-m", "tests.cluster", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                start_new_session=True,
            )
        assert serving.stdout is not None
        if serving.stdout.readline().decode().strip() != _UP:
            print(place.log.read_text(), file=sys.stderr, end="")
            return 1
        print(f"started below {place.cluster}:")
        print("    a control plane, the training operator, KWOK" + (", Kueue" if options.kueue else ""))
        print(
            f"    {_FAKE_NODES} played nodes with 8 GPUs each"
            + (f", and the real {NODE_NAME}" if shape == "node" else "")
        )
    elif options.quickstart and not place.values.exists():
        raise ClusterError(f"the cluster below {place.cluster} runs without the quickstart: `make cluster-down` first")
    else:
        print(f"the cluster below {place.cluster} runs already")
    print("use it:")
    print(f"    export KUBECONFIG={place.kubeconfig}")
    if not place.values.exists():
        print(f"    {program(KUBERNETES, 'kubectl')} get nodes")
    else:
        chart = f"posttrain charts/posttrain --namespace {NAMESPACE} --create-namespace --values {place.values}"
        print(f"    export PATH={program(KUBERNETES, 'kubectl').parent}:{program(HELM, 'helm').parent}:$PATH")
        print(f"    helm install {chart}")
        print(f"    kubectl apply --filename {_QUICKSTART.relative_to(ROOT) / 'cluster.yaml'}")
        print("    kubectl get trun --watch")
    print("stop it with `make cluster-down`")
    return 0


def serve(options: argparse.Namespace) -> int:
    """Run the cluster until SIGTERM."""
    signal.signal(signal.SIGTERM, _leave)
    place = Place(options.folder)
    place.record.write_text(json.dumps([os.getpid(), start_ticks(os.getpid())]))
    try:
        with _start(place.cluster, options) as cluster:
            cluster.add_fake_nodes(_FAKE_NODES)
            if options.quickstart:
                _bring_quickstart(cluster, values=place.values)
            place.kubeconfig.unlink(missing_ok=True)
            place.kubeconfig.symlink_to(cluster.kubeconfig)
            print(_UP, flush=True)
            signal.pause()
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        place.record.unlink()
        place.values.unlink(missing_ok=True)
    return 0


def _start(folder: Path, options: argparse.Namespace) -> TestCluster:
    if options.quickstart:
        return start_node(folder, kueue=options.kueue)
    return TestCluster.start(folder, node=options.shape == "node", kueue=options.kueue)


def _bring_quickstart(cluster: TestCluster, *, values: Path) -> None:
    """Give the real node posttrain's images, and the namespace `default` the claims of the quickstart in a cluster."""
    inputs = _QUICKSTART / "inputs"
    add_storage(cluster, "default", "inputs", copies={path.name: path for path in inputs.glob("[!.]*")})
    add_storage(cluster, "default", "models")
    load_images(cluster)
    write_values(values)


def _leave(number: int, _: FrameType | None) -> None:
    # Once: what ends a cluster is not interrupted.
    signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


def _best_shape() -> str:
    if reason := why_not("node"):
        print(f"without a real node: {reason}")
        return "fake"
    return "node"


def down(options: argparse.Namespace) -> int:
    """Stop the cluster, and whatever an earlier one left."""
    place = Place(options.folder)
    if (running := place.running()) is not None:
        with suppress(ProcessLookupError):
            os.kill(running.pid, signal.SIGTERM)
        poll(lambda: not running.is_alive(), what="the cluster to stop", seconds=_STOP_SECONDS)
    end_leftovers(place.cluster)
    place.kubeconfig.unlink(missing_ok=True)
    print(f"no cluster runs; its logs are in {place.cluster / 'logs'}")
    return 0


def parts(_: argparse.Namespace) -> int:
    """Print the parts that can be run here, as $POSTTRAIN_REQUIRE wants them."""
    print(",".join(part for part in PARTS if why_not(part) is None))
    return 0


def packages(_: argparse.Namespace) -> int:
    """Print the Debian packages that a real node needs and that are missing."""
    print(" ".join(missing_packages()))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says."""
    commands = {"up": up, "down": down, "serve": serve, "parts": parts, "packages": packages}
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument("command", choices=commands)
    parser.add_argument("--folder", type=Path, default=ROOT / ".dev", help="where it lies; default: %(default)s")
    parser.add_argument("--shape", choices=("fake", "node"), help="with a real node or without; default: if one can be")
    parser.add_argument("--kueue", action="store_true", help="with Kueue in it, and no queue")
    parser.add_argument(
        "--quickstart", action="store_true", help="the real node has posttrain's images and the quickstart's claims"
    )
    args = parser.parse_args(argv)
    if args.quickstart and args.shape == "fake":
        parser.error("--quickstart trains in pods, which played nodes do not run: leave out --shape fake")
    args.folder = args.folder.absolute()
    try:
        return commands[args.command](args)
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
