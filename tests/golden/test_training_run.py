"""Each folder of training_run/ is a case: what `plan_training_run` makes of a run and of what is observed of it."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from posttrain.api.loader import dump_document, load_documents
from posttrain.api.training_run import TrainingRun
from posttrain.plan.training_run import plan_training_run
from posttrain.plan.types import ObjectRef, Observed, Plan
from posttrain.settings import Settings

CASES = sorted(folder for folder in (Path(__file__).parent / "training_run").iterdir() if folder.is_dir())


def load(file: Path) -> dict[str, Any]:
    return load_documents(file.read_text(encoding="utf-8"), origin=str(file))[0].data


def load_observed(data: dict[str, Any]) -> Observed:
    refs = [ObjectRef(ref["apiVersion"], ref["kind"], ref["name"]) for ref in data.get("foreign", [])]
    return Observed(
        objects={ObjectRef.of(manifest): manifest for manifest in data.get("objects", [])},
        pods=tuple(data.get("pods", [])),
        foreign=frozenset(refs),
        config_maps=data.get("configMaps", {}),
        creation_events=tuple(data.get("creationEvents", [])),
        pod_events=tuple(data.get("podEvents", [])),
        server_key=data.get("serverKey", ""),
        kueue=data.get("kueue", False),
        flavors={flavor["metadata"]["name"]: flavor for flavor in data.get("flavors", [])},
        priorities=data.get("priorities", {}),
    )


def dump_plan(plan: Plan) -> str:
    assert plan.status is not None
    status = plan.status.to_data()
    data = {
        "requeueAfter": plan.requeue_after,
        **({"statusFirst": True} if plan.status_first else {}),
        "deleteRun": plan.delete_run,
        "deletes": [f"{ref.kind} {ref.name}" for ref in plan.deletes],
        "patches": [
            {
                "object": f"{patch.ref.kind} {patch.ref.name}",
                "subresource": patch.subresource,
                "patch": patch.payload,
            }
            for patch in plan.patches
        ],
        "events": [dataclasses.asdict(event) for event in plan.events],
        "status": status,
    }
    return "---\n".join([dump_document(data), *(dump_document(manifest) for manifest in plan.objects)])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_is_planned_as_its_case_expects(case: Path, request: pytest.FixtureRequest) -> None:
    observed = load(case / "observed.yaml")
    settings_file = case / "settings.yaml"
    settings = Settings.model_validate(load(settings_file)) if settings_file.exists() else Settings()
    run = TrainingRun.model_validate(load(case / "run.yaml"))
    now = datetime.fromisoformat(observed["now"])

    plan = plan_training_run(run, load_observed(observed), now=now, settings=settings)

    planned = dump_plan(plan)
    expected = case / "expected.yaml"
    if request.config.getoption("--update-golden", default=False):
        expected.write_text(planned, encoding="utf-8")
    assert planned == expected.read_text(encoding="utf-8")
