"""Whatever happens to a run, to its children, to the API server and to the operator: what always holds.

POSTTRAIN_STATE_MACHINE_EXAMPLES sets the number of stories (default 40); a long search takes some thousands.
"""

from __future__ import annotations

import os
from decimal import Decimal
from typing import Any

from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from posttrain.api.conditions import TRAINING_RUN_CONDITIONS, WATCHED_CONDITIONS
from posttrain.contract.facts import CheckpointSaved, NonFinite, PrepareResult, Started
from posttrain.contract.result import Result
from posttrain.control.kinds import (
    CHILDREN,
    CLAIM,
    CONFIG_MAP,
    JOB,
    NETWORK_POLICY,
    POD,
    PYTORCHJOB,
    SERVICE_ACCOUNT,
    TRAINING_RUN,
    Kind,
)
from posttrain.control.observe import controller_of
from posttrain.control.port import ClusterError, Conflict, InternalError, ObjectKey, Unavailable
from posttrain.plan import labels
from posttrain.plan.manifests import is_being_deleted, is_live, pod_phase
from posttrain.plan.types import Manifest
from posttrain.settings import Profile, Settings
from tests.support.bench import KINDS, Bench
from tests.support.controllers import RefusedEdit
from tests.support.faults import Crash, Fault

EXAMPLES = int(os.environ.get("POSTTRAIN_STATE_MACHINE_EXAMPLES", "40"))
EXIT_CODES = (1, 2, 137, 138, 143)
MAX_INFRASTRUCTURE, MAX_APPLICATION = 3, 2

ERRORS = st.sampled_from(
    [Unavailable("timeout"), InternalError("a webhook is away"), Conflict("the object has been modified"), Crash()]
)
FAULTS = st.builds(lambda when, error: Fault(when=when, error=error), st.sampled_from(["before", "after"]), ERRORS)
CALLS = st.lists(st.none() | FAULTS, max_size=9)
"""What becomes of the next calls of the operator."""
LAGGING = st.sets(st.sampled_from(KINDS), max_size=3) | st.just({POD})
"""Kinds whose watches deliver nothing for a while."""
NAMED = st.sampled_from(
    [(SERVICE_ACCOUNT, "demo"), (NETWORK_POLICY, "demo"), (CLAIM, "demo"), (CONFIG_MAP, "demo-a{}")]
)


class Operator(RuleBasedStateMachine):
    """One run, its operator, and everybody else.

    What always holds:

    - there are never two gangs: of all jobs that may make pods and all pods that may live, the attempt is one;
    - the attempt never decreases and grows by one at a time; no job is of an attempt that was not counted before;
    - each attempt's failure is counted exactly once, in one of the budgets, and no budget is overdrawn;
    - every child is controlled by the run, and what somebody else made under a child's name is never changed;
    - a gang has the shape that the spec asks for, as the spec keeps it while a gang may be there;
    - a run that ended stays as it ended, also under a spec that is refused;
    - the conditions are complete from the first status on;
    - usage never shrinks, is never negative, and its parts add up;
    - with all faults over, a bounded number of looks leads to a point where another look writes nothing, and
      where a suspended or finished run holds no gang.
    """

    @initialize(
        nodes=st.integers(1, 2),
        gpus=st.sampled_from([0, 2]),
        prepare=st.sampled_from([False, False, False, True]),
        retain=st.sampled_from(["Always", "Never"]),
        on_non_finite=st.sampled_from(["Fail", "Suspend", "Warn"]),
        deadline=st.sampled_from([None, 5000]),
    )
    def a_user_applies_a_run(
        self, nodes: int, gpus: int, prepare: bool, retain: str, on_non_finite: str, deadline: int | None
    ) -> None:
        self.bench = Bench(settings=Settings(profiles={"default": Profile(price_per_gpu_hour="2")}))
        deadlines = {} if deadline is None else {"activeDeadlineSeconds": deadline, "pendingDeadlineSeconds": deadline}
        self.run = self.bench.submit(
            prepare={"enabled": prepare},
            resources={"numNodes": nodes, "gpusPerNode": gpus},
            checkpoints={"storage": {"size": "10Gi"}, "retain": retain},
            restarts={
                "maxInfrastructureRestarts": MAX_INFRASTRUCTURE,
                "maxApplicationRestarts": MAX_APPLICATION,
                "progressDeadlineSeconds": 600,
                "onNonFinite": on_non_finite,
            },
            **deadlines,
        )
        self.conditions = WATCHED_CONDITIONS if on_non_finite == "Warn" else TRAINING_RUN_CONDITIONS
        self.nodes, self.gpus = nodes, gpus
        self.foreign: dict[ObjectKey, Manifest] = {}
        self.lagging: set[Kind] = set()
        self.seen = int(self.run["metadata"]["resourceVersion"])
        self.status: dict[str, Any] = {}
        self.ends = {"infrastructure": 0, "application": 0, "free": 0}

    # --- The operator ------------------------------------------------------------------------------------------------

    @rule(limit=st.sampled_from([None, None, 1, 2]), calls=st.just([]) | CALLS)
    def the_operator_looks(self, limit: int | None, calls: list[Fault | None]) -> None:
        self.see(limit=limit)
        self.bench.port.faults.extend(calls)
        self.reconcile()
        self.bench.port.faults.clear()

    @rule(turns=st.integers(1, 4), seconds=st.sampled_from([0, 20]))
    def everybody_works_for_a_while(self, turns: int, seconds: int) -> None:
        for _ in range(turns):
            self.see()
            self.reconcile()
            self.bench.others.finish_deletions()
            self.bench.others.make_pods()
            self.bench.others.run_pods(int(self.bench.status.attempt or 0))
            self.bench.wait(seconds)

    @rule(looks=st.integers(1, 4))
    def only_the_operator_works_for_a_while(self, looks: int) -> None:
        for _ in range(looks):
            self.see()
            self.reconcile()

    @rule(grace_seconds=st.sampled_from([120, 120, 5]))
    def the_operator_starts_anew(self, grace_seconds: int) -> None:
        """Mostly with the settings of the one before."""
        self.bench.settings = self.bench.settings.model_copy(update={"termination_grace_seconds": grace_seconds})
        self.bench.start()

    @rule(kinds=LAGGING)
    def watches_lag_behind(self, kinds: set[Kind]) -> None:
        self.lagging = kinds

    @precondition(lambda self: self.lagging)
    @rule()
    def watches_catch_up(self) -> None:
        self.lagging = set()

    def see(self, *, limit: int | None = None) -> None:
        for kind in KINDS:
            if kind not in self.lagging:
                self.bench.see(kind, limit=limit)

    def reconcile(self) -> None:
        try:
            self.bench.reconcile()
        except ClusterError:
            pass  # the queue comes back to it
        except Crash:
            self.bench.start()
        self.there_is_at_most_one_gang()

    # --- Controllers and nodes ---------------------------------------------------------------------------------------

    @property
    def attempt(self) -> int:
        return int(self.status.get("attempt") or 0)

    def gang_runs(self) -> bool:
        pods = self.bench.others.pods(self.attempt)
        running = [pod for pod in pods if pod_phase(pod) == "Running" and not is_being_deleted(pod)]
        return self.bench.others.job_runs(self.attempt) and len(running) == self.nodes

    @rule()
    def pods_are_made_and_run(self) -> None:
        self.bench.others.make_pods()
        self.bench.others.run_pods(self.attempt)

    @rule()
    def pods_are_made(self) -> None:
        self.bench.others.make_pods()

    @rule()
    def pods_end_that_are_being_deleted(self) -> None:
        self.bench.others.finish_deletions()

    @precondition(lambda self: self.gang_runs())
    @rule(code=st.sampled_from(EXIT_CODES), node=st.integers(0, 1), job_knows=st.booleans())
    def a_pod_fails(self, code: int, node: int, job_knows: bool) -> None:
        pods = self.bench.others.pods(self.attempt)
        self.bench.others.end_pod(pods[node % len(pods)]["metadata"]["name"], exit_code=code)
        if job_knows:
            self.bench.others.end_job(self.attempt, "Failed")

    @precondition(lambda self: self.gang_runs())
    @rule(node=st.integers(0, 1), forced=st.booleans())
    def a_pod_is_deleted(self, node: int, forced: bool) -> None:
        pods = self.bench.others.pods(self.attempt)
        name = pods[node % len(pods)]["metadata"]["name"]
        if forced:
            self.bench.others.remove_pod(name)
        else:
            self.bench.others.delete(POD, name)

    @precondition(lambda self: self.gang_runs())
    @rule(node=st.integers(0, 1))
    def a_node_is_lost(self, node: int) -> None:
        pods = self.bench.others.pods(self.attempt)
        name = pods[node % len(pods)]["metadata"]["name"]
        self.bench.others.set_pod_status(name, phase="Failed", reason="NodeLost", message="the node is gone")

    @precondition(lambda self: self.gang_runs())
    @rule(says_so=st.booleans())
    def the_gang_completes(self, says_so: bool) -> None:
        result = Result(reason="Completed", message="20 of 20 steps") if says_so else None
        self.bench.others.complete_gang(self.attempt, result=result)

    @precondition(lambda self: self.gang_runs())
    @rule(step=st.integers(0, 20), saves=st.booleans())
    def the_gang_reports(self, step: int, saves: bool) -> None:
        facts: list[Any] = [Started(world_size=self.nodes, max_steps=20, resumed_from_step=0)]
        if saves:
            facts.append(CheckpointSaved(step=step, uri="pvc://demo/demo/checkpoint", bytes=1, digest="0"))
        self.bench.others.tell(*facts, attempt=self.attempt, step=step)

    @precondition(lambda self: self.gang_runs())
    @rule()
    def the_loss_is_no_number(self) -> None:
        self.bench.others.tell(NonFinite(metric="loss", step=7), attempt=self.attempt)

    @precondition(lambda self: self.prepares())
    @rule(well=st.sampled_from([True, True, True, False]))
    def prepare_ends(self, well: bool) -> None:
        problems = () if well else ("DatasetEmpty: no row is left",)
        self.bench.others.tell(PrepareResult(problems=problems), attempt=0, source="prepare")
        self.bench.others.end_prepare("Complete" if well else "Failed")

    def prepares(self) -> bool:
        job = self.bench.others.find(JOB, "demo-prepare")
        return job is not None and not job.get("status") and not self.attempt

    # --- People ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.bench.others.jobs())
    @rule()
    def somebody_deletes_the_job(self) -> None:
        self.bench.others.delete(PYTORCHJOB, self.bench.others.jobs()[-1]["metadata"]["name"])

    @rule(named=NAMED)
    def somebody_deletes_a_child(self, named: tuple[Kind, str]) -> None:
        key = self.key(named, attempt=self.attempt)
        if key not in self.foreign and self.bench.others.find(named[0], key.name) is not None:
            self.bench.others.delete(named[0], key.name)

    @rule(what=st.sampled_from(["ingress", "label"]))
    def somebody_edits_a_child(self, what: str) -> None:
        policy = self.bench.others.find(NETWORK_POLICY, "demo")
        if policy is None or ObjectKey.of(policy) in self.foreign:
            return
        if what == "ingress":
            policy["spec"]["ingress"] = [{}]
        else:
            policy["metadata"]["labels"].pop(labels.RUN, None)
        self.bench.cluster.put(policy)

    @precondition(lambda self: not self.foreign)
    @rule(named=NAMED, ahead=st.integers(0, 1), labelled=st.booleans())
    def somebody_takes_the_name_of_a_child(self, named: tuple[Kind, str], ahead: int, labelled: bool) -> None:
        key = self.key(named, attempt=self.attempt + ahead)
        if self.bench.others.find(named[0], key.name) is None:
            own = {labels.RUN: "demo"} if labelled else {"made-by": "hand"}
            metadata = {"name": key.name, "namespace": key.namespace, "labels": own}
            made = {"apiVersion": key.api_version, "kind": key.kind, "metadata": metadata, "data": {"a": "1"}}
            self.foreign[key] = self.bench.cluster.put(made)

    @precondition(lambda self: self.foreign)
    @rule()
    def somebody_gives_the_names_back(self) -> None:
        for key in list(self.foreign):
            self.bench.cluster.remove(key)
            del self.foreign[key]

    def key(self, named: tuple[Kind, str], *, attempt: int) -> ObjectKey:
        return ObjectKey(*named[0], "team", named[1].format(attempt))

    @rule(suspend=st.booleans())
    def the_user_suspends_or_resumes(self, suspend: bool) -> None:
        self.bench.others.change_run(suspend=suspend)

    @rule(nodes=st.integers(1, 2))
    def the_user_asks_for_another_shape(self, nodes: int) -> None:
        try:
            self.bench.others.change_run(resources={"numNodes": nodes, "gpusPerNode": self.gpus})
        except RefusedEdit:
            return
        self.nodes = nodes

    @rule(refused=st.booleans())
    def the_spec_is_refused_or_taken_again(self, refused: bool) -> None:
        self.bench.others.change_run(sft={"args": {"learning_rat": 0.1} if refused else {"max_steps": 20}})

    @rule(seconds=st.sampled_from([1, 15, 31, 130, 700, 6000]))
    def time_passes(self, seconds: int) -> None:
        self.bench.wait(seconds)

    # --- What always holds -------------------------------------------------------------------------------------------

    @invariant()
    def there_is_at_most_one_gang(self) -> None:
        gangs = {
            job["metadata"]["uid"]: job["metadata"]["name"]
            for job in self.bench.others.jobs()
            if not job.get("status") and not is_being_deleted(job)
        }
        for pod in self.bench.others.pods():
            owner = controller_of(pod)
            if owner is not None and is_live(pod, now=self.bench.now):
                gangs[owner["uid"]] = owner["name"]
        assert len(gangs) <= 1, f"two gangs may write to one storage: {gangs}"

    @invariant()
    def a_gang_has_the_shape_that_the_spec_asks_for(self) -> None:
        for job in self.bench.others.jobs():
            if not job.get("status") and not is_being_deleted(job):
                replicas = job["spec"]["pytorchReplicaSpecs"].values()
                assert sum(replica["replicas"] for replica in replicas) == self.nodes

    @invariant()
    def every_version_of_the_run_follows_from_the_one_before(self) -> None:
        for change in self.bench.cluster.events(TRAINING_RUN, after=self.seen):
            self.seen = int(change.object["metadata"]["resourceVersion"])
            before, after = self.status, change.object.get("status") or {}
            self.status = after
            self.attempts_are_counted_once(before, after)
            self.the_end_stays_the_end(before, after)
            self.usage_grows(before, after)
            if after.keys() - {"progress"}:
                assert [c["type"] for c in after["conditions"]] == list(self.conditions)

    def attempts_are_counted_once(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        old, new = before.get("attempt") or 0, after.get("attempt") or 0
        grown = {
            budget: ((after.get("restarts") or {}).get(budget) or 0) - ((before.get("restarts") or {}).get(budget) or 0)
            for budget in ("infrastructure", "application")
        }
        assert new - old in (0, 1)
        if old in (0, new):
            assert grown == {"infrastructure": 0, "application": 0}
            return
        assert sorted(grown.values()) in ([0, 0], [0, 1])
        charged = next((budget for budget, count in grown.items() if count), "free")
        self.ends[charged] += 1
        if charged != "free" and after.get("completionTime") is None:
            assert after["failure"]["attempt"] == old
        assert self.ends["infrastructure"] <= MAX_INFRASTRUCTURE
        assert self.ends["application"] <= MAX_APPLICATION
        assert sum(self.ends.values()) == new - 1

    def the_end_stays_the_end(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        if before.get("completionTime") is None:
            return
        for name in ("completionTime", "stage", "attempt", "restarts", "failure", "model"):
            assert after.get(name) == before.get(name)
        assert after["conditions"] == before["conditions"]

    def usage_grows(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        old, new = ({k: Decimal(v) for k, v in self.usage_of(s).items()} for s in (before, after))
        for name in ("gpuSeconds", "wastedGpuSeconds"):
            assert new.get(name, 0) >= old.get(name, 0) >= 0
        assert new.get("productiveGpuSeconds", 0) >= 0
        assert new.get("productiveGpuSeconds", 0) + new.get("wastedGpuSeconds", 0) == new.get("gpuSeconds", 0)

    def usage_of(self, status: dict[str, Any]) -> dict[str, str]:
        return {name: value for name, value in (status.get("usage") or {}).items() if name.endswith("Seconds")}

    @invariant()
    def no_job_is_of_an_attempt_that_was_not_counted(self) -> None:
        for job in self.bench.others.jobs():
            assert int(job["metadata"]["labels"][labels.ATTEMPT]) <= self.attempt

    @invariant()
    def every_child_is_the_runs_and_what_is_anothers_is_untouched(self) -> None:
        for kind in CHILDREN:
            for manifest in self.bench.cluster.objects(kind):
                key = ObjectKey.of(manifest)
                if key in self.foreign:
                    assert manifest == self.foreign[key]
                elif kind not in (POD, CLAIM):
                    owner = controller_of(manifest)
                    assert owner is not None
                    assert owner["uid"] == self.run["metadata"]["uid"]

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        bench = self.bench
        for key in self.foreign:
            bench.cluster.remove(key)
        self.foreign.clear()
        self.the_spec_is_refused_or_taken_again(False)
        bench.wait(31)  # what stood in the way is tried again
        for _ in range(30):
            before = len(bench.port.writes())
            bench.see()
            again = bench.reconcile()
            self.every_version_of_the_run_follows_from_the_one_before()
            self.there_is_at_most_one_gang()
            ended = bench.others.finish_deletions()
            if not ended and len(bench.port.writes()) == before and again != 0:
                break
        else:
            raise AssertionError(f"no fixed point; the last writes: {bench.port.writes()[-12:]}")
        bench.port.clear()
        bench.look()
        assert bench.port.writes() == []
        # Only of a gang whose pods are not made is it asked why.
        assert [call.text for call in bench.port.calls if call.text != "list Event"] == []
        if (bench.run["spec"].get("suspend") and self.attempt) or self.status.get("completionTime"):
            assert not [pod for pod in bench.others.pods() if is_live(pod, now=bench.now)]
        event(f"stage {self.status['stage']}")
        event(f"attempts {min(self.attempt, 4)}")


TestOperator = Operator.TestCase
TestOperator.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
