"""The operator is killed at a random write of a run's life, and the run ends as if nothing had happened.

`make chaos` draws 300 of these deaths; docs/development/chaos.md says what came of it.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.cluster.cluster import TestCluster
from tests.cluster.kwok import TAINT
from tests.support.api_proxy import ApiProxy
from tests.support.cluster_runs import ClusterRun
from tests.support.lives import CODE, LIVES, RESTARTED, SUSPENDED, Life
from tests.support.operator_process import Replicas
from tests.support.trials import Death, Trial, count_created, draw_deaths, is_of, live, substance

pytestmark = [pytest.mark.integration, pytest.mark.timeout(3600)]

TRIALS = int(os.environ.get("POSTTRAIN_CHAOS_TRIALS", "15"))
SECONDS = float(os.environ.get("POSTTRAIN_CHAOS_SECONDS", "inf"))
"""After which no further trials begin."""
BESIDE_EACH_OTHER = 5


@pytest.fixture
def open_node(faulty_cluster: TestCluster) -> Iterator[str]:
    """A node that is played and takes any pod: prepare's tolerates nothing."""
    node = faulty_cluster.fake_nodes[0]
    faulty_cluster.kubectl("taint", "node", node, f"{TAINT}-")
    yield node
    faulty_cluster.kubectl("taint", "node", node, f"{TAINT}=fake:NoSchedule")


@pytest.fixture
def seed() -> int:
    """What the deaths are drawn with: $POSTTRAIN_CHAOS_SEED, or another one each time."""
    return int(os.environ.get("POSTTRAIN_CHAOS_SEED") or random.SystemRandom().randrange(10**6))


def find_faults(trial: Trial, created: Counter[str], *, undisturbed: Trial) -> list[str]:
    """Return what a life left that an undisturbed one does not."""
    faults = [f"orphan {orphan}" for orphan in trial.orphans]
    faults += [f"{child} was created {count} times" for child, count in created.items() if count > 1]
    faults += [f"{child} was never created" for child in sorted(trial.life.created - created.keys())]
    faults += [f"{child} was created" for child in sorted(created.keys() - trial.life.created)]
    expected = substance(undisturbed.status)
    for part, value in substance(trial.status).items():
        if value != expected[part]:
            faults.append(f"{part} is {value}, undisturbed {expected[part]}")
    return faults


def print_deaths(life: Life, trials: list[Trial], *, writes: int) -> None:
    """Print at which writes of a kind of life the operator died how often."""
    deaths = Counter(
        (str(trial.struck).replace(trial.run.name, "demo", 1), trial.strike.when)
        for trial in trials
        if trial.life is life and trial.strike
    )
    print(f"  {life.name}, {writes} writes undisturbed: {deaths.total()} deaths")
    for (write, when), count in sorted(deaths.items()):
        print(f"    {count:3} x {when:6} {write}")


def test_a_run_ends_the_same_whenever_the_operator_is_killed(
    faulty_cluster: TestCluster,
    faulty_namespace: str,
    open_node: str,
    proxy: ApiProxy,
    replicas: Replicas,
    seed: int,
) -> None:
    operator = replicas.add("operator", kubeconfig=proxy.kubeconfig)
    faulty_cluster.apply([CODE], namespace=faulty_namespace)

    def begin(life: Life, name: str, death: Death | None = None) -> Trial:
        return Trial(run=ClusterRun(faulty_cluster, faulty_namespace, name), life=life, death=death)

    undisturbed = {life.name: begin(life, f"undisturbed-{life.name}") for life in LIVES}
    live(faulty_cluster, operator, proxy, list(undisturbed.values()))
    writes = {
        name: [asked for asked in proxy.writes() if is_of(asked, trial.run)] for name, trial in undisturbed.items()
    }
    ends = {
        name: (trial.status["restarts"]["infrastructure"], trial.status["attempt"])
        for name, trial in undisturbed.items()
    }
    assert ends == {RESTARTED.name: (1, 2), SUSPENDED.name: (0, 2)}

    rng = random.Random(seed)
    draws = [(life, draw_deaths(rng, writes=len(writes[life.name]), trials=TRIALS)) for life in LIVES]
    began = time.monotonic()
    trials: list[Trial] = []
    while len(trials) < TRIALS and time.monotonic() - began < SECONDS:
        batch: list[Trial] = []
        for number in range(len(trials), min(len(trials) + BESIDE_EACH_OTHER, TRIALS)):
            life, deaths = draws[number % len(draws)]
            batch.append(begin(life, f"t{number}", next(deaths)))
        live(faulty_cluster, operator, proxy, batch)
        trials += batch
    seconds = time.monotonic() - began

    lived = [*undisturbed.values(), *trials]
    created = count_created(faulty_cluster, [trial.run for trial in lived])
    faults = {
        f"{trial.run.name} ({trial.life.name}, {trial.death}: {trial.struck})": found
        for trial in lived
        if (found := find_faults(trial, created[trial.run.name], undisturbed=undisturbed[trial.life.name]))
    }
    struck = [trial for trial in trials if trial.struck]
    print(f"\nseed {seed}: {len(trials)} lives, {len(struck)} deaths, {seconds:.0f} s")
    for life in LIVES:
        print_deaths(life, struck, writes=len(writes[life.name]))
    assert not faults, f"seed {seed}: {faults}"
    assert len(struck) >= 0.8 * len(trials), "too few lives met their death: the draw does not fit them"
