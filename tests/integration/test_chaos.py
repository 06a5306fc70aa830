"""The operator is killed at a random write of a run's life, and the run ends as if nothing had happened.

`make chaos` draws 300 of these deaths; docs/development/chaos.md says what came of it.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter

import pytest

from tests.cluster.cluster import TestCluster
from tests.support.api_proxy import ApiProxy
from tests.support.cluster_runs import ClusterRun
from tests.support.operator_process import Replicas
from tests.support.trials import Death, Trial, count_created, draw_deaths, is_of, live, substance

pytestmark = [pytest.mark.integration, pytest.mark.timeout(3600)]

TRIALS = int(os.environ.get("POSTTRAIN_CHAOS_TRIALS", "15"))
SECONDS = float(os.environ.get("POSTTRAIN_CHAOS_SECONDS", "inf"))
"""After which no further trials begin."""
BESIDE_EACH_OTHER = 5
CREATED_ONCE = {
    "serviceaccounts/demo",
    "networkpolicies/demo",
    *(f"{kind}/demo-a{attempt}" for kind in ("configmaps", "pytorchjobs") for attempt in (1, 2)),
    *(f"pods/demo-a{attempt}-{pod}-0" for attempt in (1, 2) for pod in ("master", "worker")),
}


@pytest.fixture
def seed() -> int:
    """What the deaths are drawn with: $POSTTRAIN_CHAOS_SEED, or another one each time."""
    return int(os.environ.get("POSTTRAIN_CHAOS_SEED") or random.SystemRandom().randrange(10**6))


def find_faults(trial: Trial, created: Counter[str], *, undisturbed: Trial) -> list[str]:
    """Return what a life left that an undisturbed one does not."""
    faults = [f"orphan {orphan}" for orphan in trial.orphans]
    faults += [f"{child} was created {count} times" for child, count in created.items() if count > 1]
    faults += [f"{child} was never created" for child in sorted(CREATED_ONCE - created.keys())]
    faults += [f"{child} was created" for child in sorted(created.keys() - CREATED_ONCE)]
    expected = substance(undisturbed.status)
    for part, value in substance(trial.status).items():
        if value != expected[part]:
            faults.append(f"{part} is {value}, undisturbed {expected[part]}")
    return faults


def test_a_run_ends_the_same_whenever_the_operator_is_killed(
    faulty_cluster: TestCluster, faulty_namespace: str, proxy: ApiProxy, replicas: Replicas, seed: int
) -> None:
    operator = replicas.add("operator", kubeconfig=proxy.kubeconfig)
    undisturbed = Trial(run=ClusterRun(faulty_cluster, faulty_namespace, "undisturbed"), death=None)
    live(faulty_cluster, operator, proxy, [undisturbed])
    writes = [asked for asked in proxy.writes() if is_of(asked, undisturbed.run)]
    assert (undisturbed.status["restarts"]["infrastructure"], undisturbed.status["attempt"]) == (1, 2)

    began = time.monotonic()
    trials: list[Trial] = []
    deaths: list[Death] = list(draw_deaths(random.Random(seed), writes=len(writes), trials=TRIALS))
    while len(trials) < TRIALS and time.monotonic() - began < SECONDS:
        batch = [
            Trial(run=ClusterRun(faulty_cluster, faulty_namespace, f"t{len(trials) + number}"), death=death)
            for number, death in enumerate(deaths[len(trials) :][:BESIDE_EACH_OTHER])
        ]
        live(faulty_cluster, operator, proxy, batch)
        trials += batch
    seconds = time.monotonic() - began

    created = count_created(faulty_cluster, [undisturbed.run, *(trial.run for trial in trials)])
    faults = {
        f"{trial.run.name} ({trial.death}: {trial.struck})": found
        for trial in (undisturbed, *trials)
        if (found := find_faults(trial, created[trial.run.name], undisturbed=undisturbed))
    }
    struck = [(str(trial.struck).replace(trial.run.name, "demo", 1), trial) for trial in trials if trial.struck]
    print(f"\nseed {seed}: {len(trials)} lives of {len(writes)} writes, {len(struck)} deaths, {seconds:.0f} s")
    for (write, when), count in sorted(Counter((text, trial.strike.when) for text, trial in struck).items()):
        print(f"  {count:3} x {when:6} {write}")
    assert not faults, f"seed {seed}: {faults}"
    assert len(struck) >= 0.8 * len(trials), "too few lives met their death: the draw does not fit them"
