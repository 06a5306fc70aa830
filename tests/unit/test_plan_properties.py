"""Whatever happens to a run, in whatever order, and wherever its operator crashes: what always holds of its plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from hypothesis import event, given, settings
from hypothesis import strategies as st

from posttrain.api.conditions import FINISHED, QUOTA_RESERVED, SUCCEEDED, find_condition, is_true
from posttrain.api.training_run import TrainingRun
from posttrain.contract.facts import (
    CheckpointSaved,
    FactBody,
    FactsReport,
    NonFinite,
    PrepareResult,
    ResultFact,
    SignalLost,
    SignalRegained,
    Started,
)
from posttrain.contract.progress import KubeflowReport
from posttrain.contract.result import Result
from posttrain.plan.kueue import WorkloadState, parse_workload, workload_ref
from posttrain.plan.manifests import is_live
from posttrain.plan.progress import next_progress
from posttrain.plan.training_run import plan_training_run
from posttrain.plan.types import Manifest, ObjectRef, Observed, Plan, StatusPatch
from posttrain.settings import Profile, Settings
from tests.support.builders import GRPO, T0, build_pod, build_report, build_run, end_pod, ended_status, rfc3339

MAX_INFRASTRUCTURE, MAX_APPLICATION = 3, 2
SETTINGS = Settings(profiles={"default": Profile(price_per_gpu_hour="2")})
EXIT_CODES = (1, 2, 137, 138, 139, 143)
WORKLOAD = workload_ref("demo")


class World:
    """A cluster in memory with one run: it does what plans say, and things happen to it."""

    def __init__(self, run: TrainingRun) -> None:
        self.now: datetime = T0
        self.run = run
        self.objects: dict[ObjectRef, Manifest] = {}
        self.pods: dict[str, Manifest] = {}
        self.uids = 0
        self.seqs: dict[tuple[int, str], int] = {}
        self.attempts_seen = 0
        self.ended: Any = None
        self.versions = 0

    # --- The operator ---

    def observed(self) -> Observed:
        return Observed(objects=dict(self.objects), pods=tuple(self.pods.values()), kueue=True)

    def plan(self) -> Plan:
        return plan_training_run(self.run, self.observed(), now=self.now, settings=SETTINGS)

    def carry_out_a_plan(self) -> None:
        self.do(self.plan())

    def crash_in_the_middle(self, pick: int) -> None:
        """Do the first `pick` things of a plan, at most all but the last."""
        self.do(self.plan(), count=pick)

    def do(self, plan: Plan, *, count: int | None = None) -> None:
        status: tuple[Callable[[Any], None], Any] = (self.write_status, plan)
        writes: list[tuple[Callable[[Any], None], Any]] = [
            *((self.delete, ref) for ref in plan.deletes),
            *((self.patch, patch) for patch in plan.patches),
            *((self.apply, manifest) for manifest in plan.objects),
        ]
        writes = [status, *writes] if plan.status_first else [*writes, status]
        for write, what in writes[: len(writes) if count is None else min(count, len(writes) - 1)]:
            write(what)

    def write_status(self, plan: Plan) -> None:
        before, status = self.run.status, plan.status
        assert status is not None
        assert status.progress is None
        assert (status.attempt or 0) - (before.attempt or 0) in (0, 1)
        kept = status.model_copy(update={"progress": before.progress})
        self.run = self.run.model_copy(update={"status": kept})

    def apply(self, manifest: Manifest) -> None:
        ref = ObjectRef.of(manifest)
        known = self.objects.get(ref)
        metadata = {**manifest["metadata"], "creationTimestamp": rfc3339(self.now)}
        if known is not None:
            metadata["creationTimestamp"] = known["metadata"]["creationTimestamp"]
        if ref == WORKLOAD:
            assert known is None or not parse_workload(known).reserved, "Kueue refuses to change what is reserved"
            self.versions += 1
            metadata |= {"uid": (known or {"metadata": {"uid": f"w-{self.versions}"}})["metadata"]["uid"]}
            metadata["resourceVersion"] = str(self.versions)
        self.objects[ref] = {**manifest, "metadata": metadata, "status": (known or {}).get("status", {})}
        if known is not None:
            return
        if ref.kind == "PyTorchJob":
            for node in range(self.run.spec.resources.num_nodes):
                self.make_pod(int(manifest["metadata"]["labels"]["posttrain.dev/attempt"]), node)

    def patch(self, patch: StatusPatch) -> None:
        known = self.objects[patch.ref]
        assert patch.payload["metadata"]["resourceVersion"] == known["metadata"]["resourceVersion"]
        status = {**known["status"], **patch.body["status"]}
        self.set_workload_status({key: value for key, value in status.items() if value is not None})

    def set_workload_status(self, status: dict[str, Any]) -> None:
        self.versions += 1
        workload = self.objects[WORKLOAD]
        metadata = {**workload["metadata"], "resourceVersion": str(self.versions)}
        self.objects[WORKLOAD] = {**workload, "metadata": metadata, "status": status}

    def make_pod(self, attempt: int, node: int) -> None:
        self.uids += 1
        pod = build_pod(
            self.run.metadata.name,
            attempt=attempt,
            node=node,
            phase="Pending",
            node_name=f"node-{node}",
            uid=f"uid-{self.uids}",
            started=self.now,
        )
        self.pods[pod["metadata"]["name"]] = pod

    def delete(self, ref: ObjectRef) -> None:
        del self.objects[ref]
        for name, pod in list(self.pods.items()):
            if name.startswith(ref.name + "-") and ref != WORKLOAD:
                if is_live(pod, now=self.now):
                    metadata = {**pod["metadata"], "deletionTimestamp": rfc3339(self.now + timedelta(seconds=120))}
                    self.pods[name] = {**pod, "metadata": metadata}
                else:
                    del self.pods[name]

    # --- What happens ---

    @property
    def attempt(self) -> int:
        return self.run.status.attempt or 0

    @property
    def job_ref(self) -> ObjectRef:
        return ObjectRef("kubeflow.org/v1", "PyTorchJob", f"demo-a{self.attempt}")

    def gang(self) -> list[str]:
        return [name for name in self.pods if name.startswith(f"demo-a{self.attempt}-")]

    def job_runs(self) -> bool:
        return bool(self.job_ref in self.objects and not self.objects[self.job_ref]["status"])

    def time_passes(self, pick: int) -> None:
        self.now += timedelta(seconds=(1, 30, 150, 700, 6000)[pick % 5])

    def terminating_pods_end(self, pick: int) -> None:
        for name in [n for n, p in self.pods.items() if "deletionTimestamp" in p["metadata"]]:
            del self.pods[name]

    def pods_run(self, pick: int) -> None:
        for name in self.gang() if self.job_runs() else ():
            if self.pods[name]["status"]["phase"] == "Pending":
                self.pods[name] = {
                    **self.pods[name],
                    "status": {"phase": "Running", "startTime": rfc3339(self.now)},
                }

    def a_pod_fails(self, pick: int) -> None:
        gang = self.gang()
        name = gang[pick % len(gang)] if gang else ""
        if self.job_runs() and gang and self.pods[name]["status"]["phase"] == "Running":
            code = EXIT_CODES[pick % len(EXIT_CODES)]
            self.pods[name] = end_pod(self.pods[name], exit_code=code, finished=self.now)
            self.objects[self.job_ref]["status"] = ended_status("Failed", at_time=self.now)

    def a_pod_is_deleted(self, pick: int) -> None:
        gang = self.gang()
        if self.job_runs() and gang:
            node = pick % len(gang)
            del self.pods[gang[node]]
            if pick % 2:
                self.make_pod(self.attempt, node)

    def somebody_deletes_the_job(self, pick: int) -> None:
        if self.job_ref in self.objects:
            self.delete(self.job_ref)

    def the_gang_succeeds(self, pick: int) -> None:
        gang = self.gang()
        if self.job_runs() and gang and all(self.pods[n]["status"]["phase"] == "Running" for n in gang):
            result = Result(reason="Completed", message="20 steps are done") if pick % 3 else None
            for name in gang:
                self.pods[name] = end_pod(self.pods[name], exit_code=0, finished=self.now, result=result)
            self.objects[self.job_ref]["status"] = ended_status("Succeeded", at_time=self.now)

    def prepare_ends(self, pick: int) -> None:
        job = self.objects.get(ObjectRef("batch/v1", "Job", "demo-prepare"))
        if job is not None and not job["status"]:
            problems = ("DatasetEmpty: no row is left",) if pick % 4 == 0 else ()
            self.tell(PrepareResult(problems=problems), attempt=0, source="prepare")
            job["status"] = ended_status("Failed" if problems else "Complete", at_time=self.now)

    def kueue_says(self, **conditions: tuple[str, str]) -> None:
        status = self.objects[WORKLOAD]["status"]
        said = {condition["type"]: condition for condition in status.get("conditions", ())}
        for type_, (value, reason) in conditions.items():
            told = {"type": type_, "status": value, "reason": reason, "message": reason}
            said[type_] = {**told, "lastTransitionTime": rfc3339(self.now)}
        self.set_workload_status({**status, "conditions": list(said.values())})

    def workload(self) -> WorkloadState | None:
        found = self.objects.get(WORKLOAD)
        return parse_workload(found) if found is not None else None

    def kueue_admits(self, pick: int) -> None:
        workload = self.workload()
        if workload is None or workload.reserved or workload.finished:
            return
        known = {c["type"]: c["status"] for c in workload.manifest["status"].get("conditions", ())}
        # A Workload that is left Admitted, or that its owner did not queue again, is never looked at.
        assert known.get("Admitted") != "True"
        assert "Evicted" not in known or known["Requeued"] == "True"
        evicted = {"Evicted": ("False", "QuotaReserved")} if "Evicted" in known else {}
        self.kueue_says(QuotaReserved=("True", "QuotaReserved"), Admitted=("True", "Admitted"), **evicted)

    def kueue_preempts(self, pick: int) -> None:
        workload = self.workload()
        if workload is not None and workload.admitted:
            self.kueue_says(Evicted=("True", "Preempted"))

    def somebody_deletes_the_workload(self, pick: int) -> None:
        self.objects.pop(WORKLOAD, None)

    def the_user_asks_for_another_shape(self, pick: int) -> None:
        """The API server allows it while the condition does not say that quota is held."""
        resources = self.run.spec.resources
        if is_true(self.run.status.conditions, QUOTA_RESERVED):
            return
        queue = ("a", "b")[pick % 2] if resources.queue_name is not None else None
        changed = resources.model_copy(update={"num_nodes": 1 + pick % 3, "queue_name": queue})
        spec = self.run.spec.model_copy(update={"resources": changed})
        self.run = self.run.model_copy(update={"spec": spec})

    def tell(self, *bodies: FactBody, attempt: int, source: str = "rank-0") -> None:
        first = self.seqs.get((attempt, source), 0) + 1
        self.seqs[attempt, source] = first + len(bodies) - 1
        self.take(build_report(*bodies, attempt=attempt, source=source, first_seq=first))

    def take(self, report: FactsReport | KubeflowReport) -> None:
        progress = next_progress(self.run.status.progress, report, received_at=self.now)
        self.run = self.run.model_copy(update={"status": self.run.status.model_copy(update={"progress": progress})})

    def the_gang_reports(self, pick: int) -> None:
        if self.attempt and self.job_runs():
            self.tell(
                Started(world_size=1, max_steps=20, resumed_from_step=pick % 16),
                CheckpointSaved(step=pick % 21, uri="pvc://demo/demo/checkpoint", bytes=1, digest="0"),
                attempt=self.attempt,
            )
            self.take(KubeflowReport(attempt=self.attempt, step=pick % 21, max_steps=20))

    def the_gang_finds_no_number(self, pick: int) -> None:
        if self.attempt and self.job_runs():
            self.tell(NonFinite(metric="loss", step=pick), attempt=self.attempt)

    def the_gang_loses_or_regains_its_signal(self, pick: int) -> None:
        if self.attempt and self.job_runs():
            lost = SignalLost(reason="RewardSignalDead", message="all alike", step=pick)
            change = lost if pick % 3 else SignalRegained(reason="RewardSignalDead", step=pick)
            self.tell(change, attempt=self.attempt)

    def the_gang_tells_its_result(self, pick: int) -> None:
        if self.attempt and self.job_runs():
            self.tell(ResultFact(result=Result(reason="Completed", message="")), attempt=self.attempt)

    def the_user_suspends_or_resumes(self, pick: int) -> None:
        spec = self.run.spec.model_copy(update={"suspend": not self.run.spec.suspend})
        metadata = self.run.metadata.model_copy(update={"generation": (self.run.metadata.generation or 0) + 1})
        self.run = self.run.model_copy(update={"spec": spec, "metadata": metadata})

    # --- What always holds ---

    def check(self) -> None:
        self.planning_again_changes_nothing()
        self.attempts_never_decrease()
        self.budgets_are_kept()
        self.there_is_at_most_one_gang()
        self.a_gang_keeps_its_shape_without_a_queue()
        self.no_gang_is_made_without_quota()
        self.quota_is_given_back_only_when_nothing_uses_it()
        self.the_end_stays_the_end()
        self.usage_adds_up()

    def planning_again_changes_nothing(self) -> None:
        first = self.plan()
        assert first.status is not None
        kept = first.status.model_copy(update={"progress": self.run.status.progress})
        run = self.run.model_copy(update={"status": kept})
        again = plan_training_run(run, self.observed(), now=self.now, settings=SETTINGS)
        assert again.status == first.status
        assert again.events == ()

    def attempts_never_decrease(self) -> None:
        status = self.plan().status
        assert status is not None
        assert (status.attempt or 0) >= self.attempts_seen
        self.attempts_seen = self.attempt

    def budgets_are_kept(self) -> None:
        restarts = self.run.status.restarts
        if restarts is not None:
            assert (restarts.infrastructure or 0) <= MAX_INFRASTRUCTURE
            assert (restarts.application or 0) <= MAX_APPLICATION

    def there_is_at_most_one_gang(self) -> None:
        plan = self.plan()
        wanted = {ObjectRef.of(o): o for o in plan.objects if o["kind"] == "PyTorchJob"}
        assert len(wanted) <= 1
        counted = plan.status.attempt if plan.status is not None and plan.status_first else self.attempt
        for ref, job in wanted.items():
            assert ref.name == f"demo-a{counted}"
            if ref in self.objects:
                assert job["spec"] == self.objects[ref]["spec"], "a live attempt's job stays as it was made"
                continue
            assert not [ref for ref in self.objects if ref.kind == "PyTorchJob"]
            assert not [n for n, pod in self.pods.items() if n.startswith("demo-a") and is_live(pod, now=self.now)]

    def a_gang_keeps_its_shape_without_a_queue(self) -> None:
        resources, job = self.run.spec.resources, self.objects.get(self.job_ref)
        if resources.queue_name is None and job is not None:
            replicas = job["spec"]["pytorchReplicaSpecs"].values()
            assert sum(replica["replicas"] for replica in replicas) == resources.num_nodes

    def no_gang_is_made_without_quota(self) -> None:
        jobs = [o for o in self.plan().objects if o["kind"] == "PyTorchJob"]
        made = [job for job in jobs if ObjectRef.of(job) not in self.objects]
        if made and self.run.spec.resources.queue_name is not None:
            workload = self.workload()
            assert workload is not None
            assert workload.admitted
            replicas = made[0]["spec"]["pytorchReplicaSpecs"].values()
            assert workload.ask.pods == sum(replica["replicas"] for replica in replicas)
            assert workload.ask.queue == self.run.spec.resources.queue_name

    def quota_is_given_back_only_when_nothing_uses_it(self) -> None:
        plan = self.plan()
        gives = WORKLOAD in plan.deletes or any(ends(patch) for patch in plan.patches)
        if gives:
            jobs = [job for ref, job in self.objects.items() if ref.kind == "PyTorchJob" and not job["status"]]
            assert not jobs
            assert not [n for n, pod in self.pods.items() if n.startswith("demo-a") and is_live(pod, now=self.now)]
        assert len(plan.patches) <= 1

    def what_is_left_comes_to_rest(self) -> None:
        """When from now on everybody does their part, the run ends, is suspended, or has a gang; and keeps no quota."""
        for _ in range(20):
            for happens in (World.prepare_ends, World.terminating_pods_end, World.kueue_admits, World.pods_run):
                happens(self, 1)
                self.carry_out_a_plan()
            self.now += timedelta(seconds=30)
        stage, workload = self.run.status.stage, self.workload()
        if stage == "Suspended":
            assert workload is None
        elif self.run.status.completion_time is not None:
            assert workload is None or workload.finished
        else:
            assert self.job_ref in self.objects
            assert workload is not None
            assert workload.admitted

    def the_end_stays_the_end(self) -> None:
        conditions = self.run.status.conditions
        if self.ended is not None:
            assert find_condition(conditions, SUCCEEDED) == self.ended
        elif is_true(conditions, FINISHED):
            self.ended = find_condition(conditions, SUCCEEDED)
            assert self.run.status.completion_time is not None

    def usage_adds_up(self) -> None:
        usage = self.run.status.usage
        if usage is not None and usage.gpu_seconds is not None:
            parts = float(usage.productive_gpu_seconds or 0) + float(usage.wasted_gpu_seconds or 0)
            assert abs(float(usage.gpu_seconds) - parts) < 0.01
            assert float(usage.wasted_gpu_seconds or 0) >= 0


def ends(patch: StatusPatch) -> bool:
    """Return whether a write to a Workload's status frees its quota."""
    conditions = {condition["type"]: condition["status"] for condition in patch.body["status"]["conditions"]}
    return conditions.get("Finished") == "True" or conditions["QuotaReserved"] == "False"


HAPPENINGS = (
    *[World.pods_run] * 5,
    *[World.prepare_ends] * 3,
    *[World.terminating_pods_end] * 4,
    *[World.the_gang_reports] * 3,
    *[World.time_passes] * 3,
    *[World.a_pod_fails] * 3,
    World.a_pod_is_deleted,
    World.crash_in_the_middle,
    World.somebody_deletes_the_job,
    World.the_gang_succeeds,
    World.the_gang_finds_no_number,
    *[World.the_gang_loses_or_regains_its_signal] * 2,
    World.the_gang_tells_its_result,
    *[World.the_user_suspends_or_resumes] * 2,
    World.the_user_asks_for_another_shape,
)
WITH_A_QUEUE = (
    *[World.kueue_admits] * 5,
    *[World.kueue_preempts] * 4,
    *[World.pods_run] * 4,
    *[World.terminating_pods_end] * 3,
    *[World.crash_in_the_middle] * 2,
    World.the_user_suspends_or_resumes,
    World.the_user_asks_for_another_shape,
    World.somebody_deletes_the_workload,
    World.somebody_deletes_the_job,
    World.time_passes,
    World.prepare_ends,
    World.a_pod_fails,
    World.a_pod_is_deleted,
    World.the_gang_reports,
    World.the_gang_succeeds,
)


@settings(max_examples=100, deadline=None)
@given(
    nodes=st.integers(1, 3),
    gpus=st.sampled_from([0, 2]),
    prepare=st.booleans(),
    on_non_finite=st.sampled_from(["Fail", "Suspend", "Warn"]),
    on_dead_reward=st.sampled_from(["Warn", "Fail", "Suspend"]),
    deadline=st.sampled_from([None, 5000]),
    ttl=st.sampled_from([None, 100]),
    story=st.lists(
        st.tuples(st.sampled_from(HAPPENINGS), st.integers(0, 59), st.integers(0, 3)), min_size=20, max_size=40
    ),
)
def test_what_always_holds_of_plans(
    nodes: int,
    gpus: int,
    prepare: bool,
    on_non_finite: str,
    on_dead_reward: str,
    deadline: int | None,
    ttl: int | None,
    story: list[tuple[Callable[[World, int], None], int, int]],
) -> None:
    spec: dict[str, Any] = {
        "sft": None,
        "grpo": {**GRPO, "signal": {"deadReward": {"policy": on_dead_reward}}},
        "resources": {"numNodes": nodes, "gpusPerNode": gpus},
        "prepare": {"enabled": prepare},
        "restarts": {
            "maxInfrastructureRestarts": MAX_INFRASTRUCTURE,
            "maxApplicationRestarts": MAX_APPLICATION,
            "progressDeadlineSeconds": 600,
            "onNonFinite": on_non_finite,
        },
    }
    if deadline is not None:
        spec |= {"activeDeadlineSeconds": deadline, "pendingDeadlineSeconds": deadline}
    if ttl is not None:
        spec["ttlSecondsAfterFinished"] = ttl
    world = World(build_run(**spec))
    world.carry_out_a_plan()
    for happens, pick, plans in story:
        happens(world, pick)
        world.check()
        for _ in range(plans):
            world.carry_out_a_plan()
            world.check()
    event(f"{world.run.status.stage}")


@settings(max_examples=60, deadline=None)
@given(
    nodes=st.integers(1, 3),
    prepare=st.booleans(),
    deadline=st.sampled_from([None, 5000]),
    story=st.lists(
        st.tuples(st.sampled_from(WITH_A_QUEUE), st.integers(0, 59), st.integers(0, 3)), min_size=20, max_size=40
    ),
)
def test_what_always_holds_of_plans_with_a_queue(
    nodes: int,
    prepare: bool,
    deadline: int | None,
    story: list[tuple[Callable[[World, int], None], int, int]],
) -> None:
    spec: dict[str, Any] = {
        "resources": {"numNodes": nodes, "gpusPerNode": 2, "queueName": "a"},
        "prepare": {"enabled": prepare},
        "restarts": {"maxInfrastructureRestarts": MAX_INFRASTRUCTURE, "maxApplicationRestarts": MAX_APPLICATION},
    }
    if deadline is not None:
        spec |= {"pendingDeadlineSeconds": deadline}
    world = World(build_run(**spec))
    for happens in (World.prepare_ends, World.kueue_admits, World.pods_run):
        for _ in range(3):
            world.carry_out_a_plan()
        happens(world, 1)
    for happens, pick, plans in story:
        happens(world, pick)
        world.check()
        for _ in range(plans):
            world.carry_out_a_plan()
            world.check()
    world.what_is_left_comes_to_rest()
    event(f"{world.run.status.stage}")


def test_an_end_is_reached_when_time_passes_and_nothing_is_left_to_wait_for() -> None:
    run = build_run(
        prepare={"enabled": False}, restarts={"maxInfrastructureRestarts": 2, "progressDeadlineSeconds": 10}
    )
    now, attempts = T0, []
    for _ in range(60):
        plan = plan_training_run(run, Observed(), now=now, settings=SETTINGS)
        assert plan.status is not None
        run = replace_status(run, plan)
        jobs = [o for o in plan.objects if o["kind"] == "PyTorchJob"]
        if jobs:
            attempts.append(jobs[0]["metadata"]["name"])
            ref = ObjectRef.of(jobs[0])
            seen = plan_training_run(run, replace(Observed(), objects={ref: jobs[0]}), now=now, settings=SETTINGS)
            run = replace_status(run, seen)
        if run.status.completion_time is not None:
            break
        now += timedelta(seconds=30)
    assert attempts == ["demo-a1", "demo-a2", "demo-a3"]
    assert run.status.failure is not None
    assert run.status.failure.reason == "RestartBudgetSpent"


def replace_status(run: TrainingRun, plan: Plan) -> TrainingRun:
    return run.model_copy(update={"status": plan.status})
