"""A run that starts from the model of another: what it waits for, what it is pinned to, and who waits for it."""

from __future__ import annotations

import json

import pytest

from posttrain.api.conditions import find_condition
from posttrain.api.training_run import TrainingRun
from posttrain.contract.config import MountedSource, TrainingConfig
from posttrain.plan.training_run import plan_training_run, preview_training_run
from posttrain.plan.types import Manifest, Observed, Plan
from posttrain.settings import Settings
from tests.support.builders import at, build_other_run, build_run

FROM_SFT = {"runRef": {"name": "sft"}}


def plan(run: TrainingRun, *runs: Manifest, seconds: float = 0, referrers: tuple[str, ...] = ()) -> Plan:
    observed = Observed(runs={other["metadata"]["name"]: other for other in runs}, referrers=referrers)
    return plan_training_run(run, observed, now=at(seconds), settings=Settings())


def accepted(plan: Plan) -> tuple[str, str, str]:
    assert plan.status is not None
    condition = find_condition(plan.status.conditions, "Accepted")
    assert condition is not None
    return condition.status, condition.reason, condition.message


def written(run: TrainingRun, plan: Plan) -> TrainingRun:
    return run.model_copy(update={"status": plan.status})


def config_of(objects: tuple[Manifest, ...]) -> TrainingConfig:
    """Return the config that the last of the ConfigMaps holds."""
    (*_, config_map) = [manifest for manifest in objects if manifest["kind"] == "ConfigMap"]
    return TrainingConfig.model_validate_json(config_map["data"]["config.json"])


def mounts_of(objects: tuple[Manifest, ...]) -> set[str]:
    return {text for manifest in objects for text in _claims(json.loads(json.dumps(manifest)))}


def _claims(value: object) -> set[str]:
    if isinstance(value, dict):
        found = {value["claimName"]} if isinstance(value.get("claimName"), str) else set()
        return found.union(*(_claims(part) for part in value.values()))
    return set().union(*(_claims(part) for part in value)) if isinstance(value, list) else set()


@pytest.mark.parametrize(
    ("others", "waits_for"),
    [
        ((), "waiting for the model of run sft: there is no such run"),
        ((build_other_run("sft", stage="Training"),), "waiting for the model of run sft, which is Training"),
    ],
)
def test_it_waits_until_the_other_has_succeeded(others: tuple[Manifest, ...], waits_for: str) -> None:
    found = plan(build_run(model=FROM_SFT), *others)
    assert accepted(found) == ("False", "ReferencePending", waits_for)
    assert found.objects == ()


def test_a_run_that_failed_has_no_model_to_start_from() -> None:
    found = plan(build_run(model=FROM_SFT), build_other_run("sft", stage="Failed", reason="CudaOutOfMemory"))
    status, reason, message = accepted(found)
    assert (status, reason) == ("False", "ReferenceFailed")
    assert message == ("run sft has ended without a model (CudaOutOfMemory: it is Failed): run it anew under that name")
    assert found.objects == ()


def test_it_goes_on_when_the_failed_run_was_mended() -> None:
    run = build_run(model=FROM_SFT)
    refused = written(run, plan(run, build_other_run("sft", stage="Failed")))
    assert accepted(plan(refused, build_other_run("sft", stage="Succeeded")))[0] == "True"


def test_an_adapter_is_no_model_to_start_from() -> None:
    found = plan(build_run(model=FROM_SFT), build_other_run("sft", stage="Training", peft={"method": "LoRA"}))
    assert accepted(found)[:2] == ("False", "ReferenceFailed")


def test_its_pods_read_the_claim_on_which_the_other_put_its_model() -> None:
    found = plan(build_run(model=FROM_SFT), build_other_run("sft", stage="Succeeded"))
    assert config_of(found.objects).model == MountedSource(mount="claim-sft", path="sft/model")
    assert mounts_of(found.objects) == {"demo", "inputs", "sft"}


def test_what_it_started_from_stays_when_the_other_run_is_gone() -> None:
    run = build_run(model=FROM_SFT, prepare={"enabled": False})
    begun = plan(run, build_other_run("sft", stage="Succeeded"))
    assert begun.status is not None
    assert begun.status.provenance is not None
    assert begun.status.provenance.model_source == "pvc://sft/sft/model"

    found = plan(written(run, begun))
    assert accepted(found)[0] == "True"
    assert config_of(found.objects).model == MountedSource(mount="claim-sft", path="sft/model")


def test_a_run_outlives_its_ttl_while_another_starts_from_it() -> None:
    run = build_run(ttlSecondsAfterFinished=60)
    stored = build_other_run("demo", stage="Succeeded")["status"]
    ended = run.model_copy(update={"status": run.status.model_validate_json(json.dumps(stored))})
    kept = plan(ended, seconds=61, referrers=("grpo",))
    assert (kept.delete_run, kept.requeue_after) == (False, 60)
    assert plan(ended, seconds=61).delete_run


def test_a_preview_says_where_the_model_will_be() -> None:
    sft = build_run(name="sft", checkpoints={"storage": {"claimName": "shared"}})
    run = build_run(model=FROM_SFT)
    beside = preview_training_run(run, now=at(0), settings=Settings(), beside=[sft, run])
    assert config_of(beside).model == MountedSource(mount="claim-shared", path="sft/model")
    alone = preview_training_run(run, now=at(0), settings=Settings())
    assert config_of(alone).model == MountedSource(mount="claim-sft", path="sft/model")
