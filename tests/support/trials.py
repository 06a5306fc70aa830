"""Trials: short lives of runs, each cut through once by the operator's death at a drawn write of that run.

It owns the draw, and what is found after each life; it must not judge it. Several runs live beside each other, so the
death that is one run's own finds the others anywhere in their lives.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from posttrain.plan import labels
from tests.cluster.cluster import TestCluster
from tests.cluster.errors import ClusterError
from tests.cluster.processes import poll
from tests.support.api_proxy import ApiProxy, ApiRequest, Strike, When
from tests.support.cluster_runs import ClusterRun, reasons
from tests.support.lives import Done, Life
from tests.support.operator_process import OperatorProcess

LIFE_SECONDS = 120.0
_COLLECTED_SECONDS = 120.0
"""The garbage collector of a cluster that has just begun takes up to a minute to know a kind that came after it."""
_CHILDREN = "pytorchjobs,jobs,pods,configmaps,serviceaccounts,persistentvolumeclaims,networkpolicies"
_COUNTED = frozenset({"pytorchjobs", "jobs", "pods", "configmaps", "serviceaccounts", "networkpolicies"})


@dataclass(frozen=True, kw_only=True)
class Death:
    """A moment in a run's life: its n-th write, before the API server saw it or with the answer lost."""

    number: int
    when: When


@dataclass(kw_only=True)
class Trial:
    """One run's life, and what it left behind."""

    run: ClusterRun
    life: Life
    death: Death | None
    strike: Strike | None = None
    status: dict[str, Any] = field(default_factory=dict)
    orphans: list[str] = field(default_factory=list)
    """Objects with the run's label that are neither the run's nor its children's."""

    @property
    def struck(self) -> ApiRequest | None:
        """The write at which the operator died; None where the life had not so many."""
        return self.strike.struck if self.strike else None


def draw_deaths(rng: random.Random, *, writes: int, trials: int) -> Iterator[Death]:
    """Yield moments in a random order, every one of them once before any comes again."""
    moments: list[Death] = []
    for _ in range(trials):
        if not moments:
            moments = [Death(number=n, when=when) for n in range(1, writes + 1) for when in ("before", "after")]
            rng.shuffle(moments)
        yield moments.pop()


def live(cluster: TestCluster, operator: OperatorProcess, proxy: ApiProxy, trials: Sequence[Trial]) -> None:
    """Live these lives beside each other, note what each left, and delete the runs.

    Raises:
        ClusterError: a run did not end in time; the message has its status.
    """
    for trial in trials:
        if trial.death is not None:
            trial.strike = _arrange(operator, proxy, trial.run, trial.death)
        trial.run.apply(**trial.life.spec)
    _play(cluster, operator, trials)
    proxy.strikes.clear()
    for trial in trials:
        trial.orphans = _await_no_orphans(trial.run)
    names = [trial.run.name for trial in trials]
    trials[0].run.kubectl("delete", "trainingrun", *names, "--wait=false", "--ignore-not-found")


def substance(status: dict[str, Any]) -> dict[str, Any]:
    """Return what of a status does not depend on when and where it all happened, nor on the run's name."""
    failure = status.get("failure") or {}
    restarts = dict(status.get("restarts") or {})
    restarts["nodeFailures"] = sum((restarts.pop("nodeFailures", None) or {}).values())
    return {
        **{name: status.get(name) for name in ("stage", "attempt", "gpus", "model", "hold")},
        "restarts": restarts,
        "failure": {name: failure.get(name) for name in ("reason", "rank", "exitCode", "attempt")},
        "conditions": reasons(status),
    }


def is_of(asked: ApiRequest, run: ClusterRun) -> bool:
    """Return whether a request is about a run, a child of it or an event of it."""
    return asked.namespace == run.namespace and _belongs(asked.name, run.name)


def count_created(cluster: TestCluster, runs: Sequence[ClusterRun]) -> dict[str, Counter[str]]:
    """Return by run how often each of its children was created, whoever did it: `pytorchjobs/demo-a1`."""
    created: dict[str, Counter[str]] = {run.name: Counter() for run in runs}
    (namespace,) = {run.namespace for run in runs}
    for event in cluster.audit():
        about = event.get("objectRef") or {}
        if (event["verb"], about.get("namespace"), event["responseStatus"].get("code")) != ("create", namespace, 201):
            continue
        name = about.get("name") or ""
        if about["resource"] in _COUNTED and not about.get("subresource"):
            for run in runs:
                if _belongs(name, run.name):
                    created[run.name][f"{about['resource']}/{name.replace(run.name, 'demo', 1)}"] += 1
    return created


def _belongs(name: str, run: str) -> bool:
    return name == run or name.startswith((f"{run}-", f"{run}."))


def _arrange(operator: OperatorProcess, proxy: ApiProxy, run: ClusterRun, death: Death) -> Strike:
    seen = 0

    def match(asked: ApiRequest) -> bool:
        nonlocal seen
        if not asked.is_write or not is_of(asked, run):
            return False
        seen += 1
        return seen == death.number

    return proxy.strike(match, when=death.when, act=operator.kill)


# --- The world -------------------------------------------------------------------------------------------------------


def _play(cluster: TestCluster, operator: OperatorProcess, trials: Sequence[Trial]) -> None:
    """Let befall each run what its life brings, until all have ended; a dead operator is started again."""
    namespace = trials[0].run.namespace
    done: dict[str, Done] = {trial.run.name: set() for trial in trials}

    def look() -> bool:
        if not operator.process.is_running():
            operator.process.start(wait=False)
        found = cluster.get("trainingruns,pods", "--namespace", namespace)["items"]
        pods = [item for item in found if item["kind"] == "Pod"]
        runs = {item["metadata"]["name"]: item for item in found if item["kind"] == "TrainingRun"}
        for trial in trials:
            if trial.run.name in runs:
                trial.status = runs[trial.run.name].get("status") or {}
                trial.life.befall(trial.run, trial.status, pods, done[trial.run.name])
        return all(_has_ended(trial, is_there=trial.run.name in runs) for trial in trials)

    try:
        poll(look, what="every run to end", seconds=LIFE_SECONDS)
    except ClusterError as error:
        left = {trial.run.name: trial.status for trial in trials if trial.status.get("stage") != "Succeeded"}
        raise ClusterError(f"{error}: {left}") from error


def _has_ended(trial: Trial, *, is_there: bool) -> bool:
    return trial.status.get("stage") in ("Succeeded", "Failed") and is_there != trial.life.expires


def _await_no_orphans(run: ClusterRun) -> list[str]:
    """Return what is left without an owner when the garbage collector has had its time: of a run that is gone, all."""
    where = ("--namespace", run.namespace)
    runs = run.cluster.get("trainingruns", *where, f"--field-selector=metadata.name={run.name}")["items"]
    uids = {found["metadata"]["uid"] for found in runs}
    orphans: list[str] = []

    def look() -> bool:
        selector = ("--selector", f"{labels.RUN}={run.name}")
        found = run.cluster.get(_CHILDREN, *where, *selector)["items"]
        own = uids | {child["metadata"]["uid"] for child in found if _owner(child) in uids}
        orphans[:] = [f"{child['kind']}/{child['metadata']['name']}" for child in found if _owner(child) not in own]
        return not orphans

    with suppress(ClusterError):
        poll(look, what="the garbage collector", seconds=_COLLECTED_SECONDS)
    return orphans


def _owner(child: dict[str, Any]) -> str | None:
    references = child["metadata"].get("ownerReferences") or ()
    return next((reference["uid"] for reference in references if reference.get("controller")), None)
