"""Kinds of lives for trials: what a run asks for, what befalls it, and which children are made for it, each once.

It owns what the world does to a run as the run goes on; it must not know that an operator dies meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.contract.result import Result, to_termination_message
from posttrain.plan import labels
from posttrain.plan.types import Manifest
from tests.cluster.kwok import simulation
from tests.support.cluster_runs import COMPLETED, ClusterRun

CODE: Mapping[str, Any] = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {"name": "code"},
    "data": {"callbacks.py": "class Silent: ...\n"},
}
"""To be in the namespace: the own code of the runs that have some."""
_KILLED = Result(reason="RankKilled", message="rank 1 was killed by signal 9", rank=1)
_PREPARED = Result(reason="Completed", message="prepared")
_ONE_GANG = frozenset({"configmaps/demo-a1", "pytorchjobs/demo-a1", "pods/demo-a1-master-0", "pods/demo-a1-worker-0"})
_OF_EVERY_RUN = frozenset({"serviceaccounts/demo", "networkpolicies/demo"})
_TWO_GANGS = _OF_EVERY_RUN | _ONE_GANG | {child.replace("demo-a1", "demo-a2") for child in _ONE_GANG}
_TTL_SECONDS = 5
"""Long enough for the end to be seen by who looks a few times a second."""

Done = set[str]
"""What has befallen a run already."""


@dataclass(frozen=True, kw_only=True)
class Life:
    """One kind. `befall` gets the run, its status and the pods of its namespace, again and again until its end."""

    name: str
    spec: Mapping[str, Any]
    befall: Callable[[ClusterRun, Mapping[str, Any], Sequence[Manifest], Done], None]
    created: frozenset[str]
    """The children, of a run named `demo`; but for prepare's pod, whose name is not known beforehand."""
    expires: bool = False
    """Whether its TTL removes the run in the end."""


def _kill_the_first_gang(run: ClusterRun, status: Mapping[str, Any], pods: Sequence[Manifest], done: Done) -> None:
    attempt = status.get("attempt") or 0
    if status.get("attemptRunningTime") and _once(f"attempt {attempt}", done):
        if attempt == 1:
            # The job is over then, and its master is taken away.
            run.end_pod(1, attempt=attempt, exit_code=138, message=to_termination_message(_KILLED))
        else:
            _end_well(run, attempt)


def _prepare_and_suspend(run: ClusterRun, status: Mapping[str, Any], pods: Sequence[Manifest], done: Done) -> None:
    for pod in pods:
        of = pod["metadata"]["labels"]
        if (of.get(labels.RUN), of.get(labels.ROLE)) == (run.name, labels.ROLE_PREPARE) and _once("prepare", done):
            played = simulation(exit_code="0", message=to_termination_message(_PREPARED))
            run.kubectl(
                "annotate", "pod", pod["metadata"]["name"], *(f"{key}={value}" for key, value in played.items())
            )
    running = status.get("attempt") if status.get("attemptRunningTime") else None
    if running == 1 and _once("suspend", done):
        run.patch({"suspend": True})
    if status.get("stage") == "Suspended" and _once("resume", done):
        run.patch({"suspend": False})
    if running == 2 and _once("end", done):
        _end_well(run, 2)


def _end_well(run: ClusterRun, attempt: int) -> None:
    # The worker first: a job has succeeded when its master has, and its workers are taken away then.
    for node in (1, 0):
        run.end_pod(node, attempt=attempt, exit_code=0, message=to_termination_message(COMPLETED))


def _once(what: str, done: Done) -> bool:
    first = what not in done
    done.add(what)
    return first


RESTARTED = Life(name="restarted", spec={}, befall=_kill_the_first_gang, created=_TWO_GANGS)
"""Two nodes, no prepare: the first gang dies of a killed rank, the second one completes."""

SUSPENDED = Life(
    name="suspended",
    spec={
        "prepare": {"enabled": True},
        "code": {"configMapName": CODE["metadata"]["name"]},
        "callbacks": [{"function": "callbacks:Silent"}],
        "ttlSecondsAfterFinished": _TTL_SECONDS,
    },
    befall=_prepare_and_suspend,
    created=_TWO_GANGS | {"configmaps/demo-code", "configmaps/demo-prepare", "jobs/demo-prepare"},
    expires=True,
)
"""With prepare and own code: the first gang is suspended, the second one completes, and the TTL takes it all away."""

LIVES = (RESTARTED, SUSPENDED)
