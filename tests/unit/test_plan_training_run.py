"""What the golden cases do not show of `plan_training_run`, and what must hold of all its words and names."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import posttrain.plan
from posttrain.api.conditions import TRAINING_RUN_CONDITIONS, find_condition
from posttrain.api.reasons import REASONS
from posttrain.api.training_run import TrainingRun
from posttrain.api.training_run_status import Progress
from posttrain.contract.config import TrainingConfig
from posttrain.contract.facts import CheckpointSaved, FirstError, Logged, PrepareResult, Started
from posttrain.contract.progress import KubeflowReport
from posttrain.contract.result import Result
from posttrain.plan import names
from posttrain.plan.progress import next_progress
from posttrain.plan.pytorchjob import parse_job_state
from posttrain.plan.training_run import plan_training_run, preview_training_run
from posttrain.plan.types import Manifest, ObjectRef, Observed, Plan
from posttrain.settings import Settings
from tests.support.builders import (
    T0,
    at,
    build_observed_job,
    build_pod,
    build_report,
    build_run,
    end_pod,
    ended_status,
    rfc3339,
)

PLAN_SOURCES = sorted(Path(posttrain.plan.__path__[0]).glob("*.py"))


def plan(
    run: TrainingRun, observed: Observed | None = None, *, seconds: float = 0, settings: Settings | None = None
) -> Plan:
    return plan_training_run(run, observed or Observed(), now=at(seconds), settings=settings or Settings())


def written(run: TrainingRun, plan: Plan, progress: Progress | None = None) -> TrainingRun:
    assert plan.status is not None
    return run.model_copy(update={"status": plan.status.model_copy(update={"progress": progress})})


def running(**spec: Any) -> tuple[TrainingRun, Manifest, Manifest]:
    """Return a run whose first gang is up, its job and its pod."""
    run = build_run(prepare={"enabled": False}, **spec)
    run = written(run, plan(run))
    job, pod = build_observed_job("demo", attempt=1), build_pod("demo")
    return written(run, plan(run, observe(job, pod))), job, pod


def observe(*manifests: Manifest, **fields: Any) -> Observed:
    return Observed(
        objects={ObjectRef.of(m): m for m in manifests if "kind" in m},
        pods=tuple(m for m in manifests if "kind" not in m),
        **fields,
    )


def succeeded_says(plan: Plan) -> str:
    assert plan.status is not None
    condition = find_condition(plan.status.conditions, "Succeeded")
    assert condition is not None
    return condition.reason


# --- Words and names -------------------------------------------------------------------------------------------------


def words_in(tree: ast.AST) -> Iterator[str]:
    """Yield every text that stands for a reason: in Says, in a `reason=`, in a table of reasons, in REASONS[…]."""
    for node in ast.walk(tree):
        values: list[ast.expr] = []
        match node:
            case ast.Call(func=ast.Name(id="Says"), args=[_, reason, *_]):
                values = [reason]
            case ast.Call(func=ast.Name(id="refuse"), args=[_, reason, *_]):
                values = [reason]
            case ast.Call(keywords=keywords):
                values = [keyword.value for keyword in keywords if keyword.arg == "reason"]
            case ast.Assign(targets=[ast.Name(id="reason")], value=value):
                values = [value]
            case ast.AnnAssign(target=ast.Name(id="_BUDGETS"), value=ast.Dict(keys=keys)):
                values = [key for key in keys if key is not None]
            case ast.FunctionDef(name="_reason_of_code"):
                values = [part.value for part in ast.walk(node) if isinstance(part, ast.Return) and part.value]
            case ast.Subscript(value=ast.Name(id="REASONS"), slice=key):
                values = [key]
        for value in values:
            branches = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
            for branch in branches:
                if isinstance(branch, ast.Constant) and isinstance(branch.value, str):
                    yield branch.value


def test_every_reason_that_a_plan_can_give_is_in_the_catalogue() -> None:
    words = {word for file in PLAN_SOURCES for word in words_in(ast.parse(file.read_text(encoding="utf-8")))}

    assert words <= set(REASONS)
    assert len(words) > 25


def test_every_child_of_a_run_with_the_longest_name_has_a_name_that_is_a_label() -> None:
    run = build_run(
        name="r" * 40,
        code={"configMapName": "code"},
        resources={"numNodes": 1024, "gpusPerNode": 0},
        datasets=[{"source": f"pvc://{'c' * 63}/x.jsonl"}],
    )
    manifests = preview_training_run(run, now=T0, settings=Settings())
    found = [manifest["metadata"]["name"] for manifest in manifests]
    found.append(names.pod_name("r" * 40, attempt=9999, node=1023))
    job = next(m for m in manifests if m["kind"] == "PyTorchJob")
    volumes = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["volumes"]
    found += [volume["name"] for volume in volumes]

    assert max(len(name) for name in found) <= 63


def test_names_tell_attempts_from_everything_else() -> None:
    assert names.attempt_of("demo", name="demo-a12") == 12
    assert names.attempt_of("demo-a1", name="demo-a1-a2") == 2
    for other in ("demo-prepare", "demo-code", "demo", "demo-a0", "demo-ab", "other-a1", "demo-a1-a2"):
        assert names.attempt_of("demo", name=other) is None


def test_every_condition_is_there_from_the_first_plan() -> None:
    first = plan(build_run())

    assert first.status is not None
    assert tuple(c.type for c in first.status.conditions or ()) == TRAINING_RUN_CONDITIONS
    assert all(c.observed_generation == 1 for c in first.status.conditions or ())


def test_the_status_of_a_long_run_that_fails_stays_below_16_kib() -> None:
    run, job, pod = running(resources={"gpusPerNode": 8}, model={"source": "Qwen/Qwen2.5-1.5B"})
    progress = next_progress(
        None,
        build_report(PrepareResult(warnings=("w" * 900,) * 9), attempt=0, source="prepare"),
        received_at=T0,
    )
    facts: list[Any] = [Started(world_size=8, max_steps=5000, resumed_from_step=0, versions={"trl": "1.16.0"})]
    for step in range(1, 120):
        facts.append(Logged(step=step, metrics={"loss": "0.12345678901234567", "learning_rate": "1.2345678901234e-05"}))
        facts.append(CheckpointSaved(step=step, uri="pvc://demo/demo/checkpoint", bytes=1, digest="sha256:" + "0" * 64))
    progress = next_progress(progress, build_report(*facts), received_at=at(10))
    metrics = {f"some_metric_of_the_trainer_{i}": "0.12345678901234567" for i in range(40)}
    progress = next_progress(
        progress, KubeflowReport(attempt=1, step=130, max_steps=5000, metrics=metrics), received_at=at(20)
    )
    for node in range(64):
        error = FirstError(rank=node, time=T0, reason="TrainingFailed", message="m" * 5000)
        progress = next_progress(progress, build_report(error, source=f"launch-{node}"), received_at=at(30))
    pod = end_pod(pod, exit_code=1, finished=at(40), result=Result(reason="TrainingFailed", message="m" * 3500))
    job = {**job, "status": ended_status("Failed", at_time=at(40))}

    ended = written(run, plan(written(run, plan(run, observe(job, pod)), progress), observe(job, pod), seconds=41))
    status = ended.status.model_copy(update={"progress": progress})

    assert status.completion_time is not None
    assert len(json.dumps(status.to_data())) < 16 * 1024


# --- Reading PyTorchJob ----------------------------------------------------------------------------------------------


def test_a_resumed_job_whose_last_condition_is_an_old_suspension_has_not_ended() -> None:
    conditions = [{"type": "Running", "status": "True"}, {"type": "Suspended", "status": "False"}]
    state = parse_job_state(build_observed_job("demo", attempt=1, status={"conditions": conditions}))

    assert state.phase == "Pending"


def test_the_end_of_a_job_is_read_by_type_and_status() -> None:
    conditions = [
        {"type": "Running", "status": "False"},
        {"type": "Failed", "status": "True", "message": "1 replica failed", "lastTransitionTime": rfc3339(at(5))},
        {"type": "Succeeded", "status": "False"},
    ]
    state = parse_job_state(build_observed_job("demo", attempt=1, status={"conditions": conditions}))

    assert (state.phase, state.message, state.ended) == ("Failed", "1 replica failed", at(5))


# --- Decisions -------------------------------------------------------------------------------------------------------


def test_a_live_attempt_is_not_rendered_again() -> None:
    run, job, pod = running()
    kinds = [o["kind"] for o in plan(run, observe(job, pod)).objects]

    assert "PyTorchJob" not in kinds


def test_a_live_attempts_config_map_is_repaired() -> None:
    run, job, pod = running()

    assert [o["metadata"]["name"] for o in plan(run, observe(job, pod)).objects if o["kind"] == "ConfigMap"] == [
        "demo-a1"
    ]


def test_a_later_attempt_has_the_profile_image_and_commits_of_the_first() -> None:
    run = build_run(prepare={"enabled": False}, resources={"gpusPerNode": 1})
    first = Settings.model_validate({"images": {"trainer": "trainer:1"}, "profiles": {"default": {"cpu": "4"}}})
    later = Settings.model_validate({"images": {"trainer": "trainer:2"}, "profiles": {"default": {"cpu": "32"}}})
    run = written(run, plan(run, settings=first))

    objects = plan(run, settings=later).objects

    container = objects[-1]["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    assert container["image"] == "trainer:1"
    assert container["resources"]["limits"]["cpu"] == "4"


def test_the_digest_that_the_first_attempt_ran_is_pinned() -> None:
    run, job, pod = running()
    image = "ghcr.io/posttrain/trainer@sha256:" + "a" * 64
    pod["status"]["containerStatuses"] = [{"name": "pytorch", "imageID": f"docker-pullable://{image}"}]

    status = plan(run, observe(job, pod)).status

    assert status is not None
    assert status.provenance is not None
    assert status.provenance.image_digests == {"trainer": image}


def test_prepares_commits_reach_the_attempts_config() -> None:
    commits = {"model": "a" * 40, "datasets/0": "b" * 40}
    run = build_run(model={"source": "org/model"}, datasets=[{"source": "org/data"}])
    run = written(run, plan(run))
    report = build_report(PrepareResult(commits=commits), attempt=0, source="prepare")
    run = run.model_copy(
        update={"status": run.status.model_copy(update={"progress": next_progress(None, report, received_at=T0)})}
    )
    run = written(run, plan(run), run.status.progress)

    objects = plan(run).objects
    config = TrainingConfig.from_json(
        next(o for o in objects if o["metadata"]["name"] == "demo-a1")["data"]["config.json"]
    )

    assert config.model.model_dump() == {"kind": "Hub", "repo": "org/model", "revision": "a" * 40}
    assert config.datasets[0].model_dump() == {"kind": "Hub", "repo": "org/data", "revision": "b" * 40}


@pytest.mark.parametrize(
    ("model", "runs"),
    [
        ({"source": "org/model"}, True),
        ({"source": "org/model", "revision": "v1"}, True),
        ({"source": "org/model", "revision": "c" * 40}, False),
        ({"source": "pvc://inputs/model"}, False),
    ],
)
def test_without_checks_prepare_runs_only_to_resolve_a_revision(model: dict[str, str], runs: bool) -> None:
    first = plan(build_run(model=model, prepare={"enabled": False}))

    assert any(o["kind"] == "Job" for o in first.objects) is runs


def test_a_lost_prepare_result_is_waited_for_and_then_fails_the_run() -> None:
    run = build_run(model={"source": "org/model"})
    run = written(run, plan(run))
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "demo-prepare"},
        "status": ended_status("Complete", at_time=at(100)),
    }

    assert plan(run, observe(job), seconds=110).requeue_after == 50
    assert succeeded_says(plan(run, observe(job), seconds=160)) == "PrepareFailed"


def test_suspension_wins_over_the_failure_that_comes_with_it() -> None:
    run, job, pod = running()
    run = run.model_copy(update={"spec": run.spec.model_copy(update={"suspend": True})})
    pod = end_pod(pod, exit_code=1, finished=at(5))
    job = {**job, "status": ended_status("Failed", at_time=at(5))}

    status = plan(run, observe(job, pod), seconds=6).status

    assert status is not None
    assert (status.stage, status.attempt, status.failure) == ("Suspended", 2, None)
    assert status.restarts is not None
    assert status.restarts.application == 0


def test_success_wins_over_a_suspension_that_comes_too_late() -> None:
    run, job, pod = running()
    run = run.model_copy(update={"spec": run.spec.model_copy(update={"suspend": True})})
    pod = end_pod(pod, exit_code=0, finished=at(5), result=Result(reason="Completed", message="done"))
    job = {**job, "status": ended_status("Succeeded", at_time=at(5))}

    assert succeeded_says(plan(run, observe(job, pod), seconds=6)) == "Completed"


def test_a_job_that_succeeded_keeps_its_logs_though_a_worker_has_not_ended_yet() -> None:
    run, job, pod = running()
    pod = end_pod(pod, exit_code=0, finished=at(5), result=Result(reason="Completed", message="done"))
    worker = build_pod("demo", uid="late")
    ended = observe({**job, "status": ended_status("Succeeded", at_time=at(5))}, pod, worker)

    run = written(run, plan(run, ended, seconds=6))

    assert plan(run, ended, seconds=7).deletes == ()


def test_a_pod_on_a_silent_node_is_given_up_two_minutes_after_its_grace_period() -> None:
    run, job, pod = running()
    failed = {**job, "status": ended_status("Failed", at_time=at(5))}
    peer = end_pod(build_pod("demo", uid="x"), exit_code=138, finished=at(5))
    run = written(run, plan(run, observe(failed, peer), seconds=20))
    pod["metadata"]["deletionTimestamp"] = rfc3339(at(140))

    waiting = plan(run, observe(pod), seconds=200)
    assert not any(o["kind"] == "PyTorchJob" for o in waiting.objects)
    assert waiting.requeue_after == 60

    assert any(o["kind"] == "PyTorchJob" for o in plan(run, observe(pod), seconds=260).objects)


def test_code_that_changed_while_its_snapshot_was_lost_is_another_run() -> None:
    run = build_run(code={"configMapName": "mine"}, prepare={"enabled": False})
    run = written(run, plan(run, Observed(config_maps={"mine": {"a.py": "x = 1"}})))

    changed = plan(run, Observed(config_maps={"mine": {"a.py": "x = 2"}}))

    assert succeeded_says(changed) == "SpecChanged"


def test_packages_of_own_code_keep_their_folders() -> None:
    run = build_run(code={"configMapName": "mine"}, prepare={"enabled": False})
    files = {"mine": {"rewards..math.py": "", "main.py": ""}}
    run = written(run, plan(run, Observed(config_maps=files)))
    objects = plan(run, Observed(config_maps=files)).objects

    snapshot = next(o for o in objects if o["metadata"]["name"] == "demo-code")
    assert sorted(snapshot["data"]) == ["main.py", "rewards..math.py"]
    volumes = objects[-1]["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["volumes"]
    code = next(volume for volume in volumes if volume["name"] == "code")
    assert code["configMap"]["items"] == [
        {"key": "main.py", "path": "main.py"},
        {"key": "rewards..math.py", "path": "rewards/math.py"},
    ]


def test_the_deadline_does_not_run_out_on_a_suspended_run() -> None:
    run, job, pod = running(activeDeadlineSeconds=100)
    run = run.model_copy(update={"spec": run.spec.model_copy(update={"suspend": True})})
    run = written(run, plan(run, observe(job, pod), seconds=50))

    assert succeeded_says(plan(run, seconds=5000)) == "Suspended"


def test_a_preview_shows_everything_that_a_run_begins_with() -> None:
    run = build_run(parallelism={"strategy": "ZeRO2"}, code={"configMapName": "mine"})

    assert [(o["kind"], o["metadata"]["name"]) for o in preview_training_run(run, now=T0, settings=Settings())] == [
        ("ServiceAccount", "demo"),
        ("PersistentVolumeClaim", "demo"),
        ("NetworkPolicy", "demo"),
        ("ConfigMap", "demo-prepare"),
        ("Job", "demo-prepare"),
        ("ConfigMap", "demo-a1"),
        ("PyTorchJob", "demo-a1"),
    ]
