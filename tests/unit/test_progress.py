"""Posts of transformers' KubeflowCallback, read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from posttrain.contract.facts import BODY_MAX_BYTES
from posttrain.contract.progress import KubeflowReport, parse_kubeflow_report


def body(**metrics: Any) -> bytes:
    listed = [{"name": name, "value": str(value)} for name, value in metrics.items()]
    status = {"progressPercentage": 12, "estimatedRemainingSeconds": 999, "metrics": listed}
    return json.dumps({"trainerStatus": {**status, "lastUpdatedTime": "2026-03-01T09:00:00+00:00"}}).encode()


def test_a_post_after_a_step_is_read_without_its_own_percentage_and_eta() -> None:
    report = parse_kubeflow_report(
        body(loss=1.5, learning_rate=2e-05, current_step=12, total_steps=100, current_epoch=0.24), attempt=3
    )

    assert report == KubeflowReport(
        attempt=3, step=12, max_steps=100, epoch="0.24", metrics={"loss": "1.5", "learning_rate": "2e-05"}
    )


@pytest.mark.parametrize("metrics", [{"total_steps": 100}, {"loss": 0.5}, {}])
def test_posts_at_the_start_and_at_the_end_name_no_step_and_are_passed_over(metrics: dict[str, Any]) -> None:
    assert parse_kubeflow_report(body(**metrics), attempt=1) is None


def test_a_post_without_metrics_is_passed_over() -> None:
    assert parse_kubeflow_report(b'{"trainerStatus": {"progressPercentage": 0}}', attempt=1) is None


def test_an_over_long_metric_is_dropped_and_the_rest_of_the_post_kept() -> None:
    report = parse_kubeflow_report(
        body(**{"current_step": 1, "x" * 65: 1, "long": "9" * 65, "loss": 2.0, "y" * 64: "8" * 64}), attempt=1
    )

    assert report is not None
    assert report.metrics == {"loss": "2.0", "y" * 64: "8" * 64}


def test_more_than_256_metrics_are_cut() -> None:
    report = parse_kubeflow_report(body(current_step=1, **{f"m{i}": i for i in range(300)}), attempt=1)

    assert report is not None
    assert len(report.metrics) == 256


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "no object `trainerStatus`"),
        (b'{"trainerStatus": 3}', "no object `trainerStatus`"),
        (b'{"trainerStatus": {"metrics": {}}}', "is not a list"),
        (b'{"trainerStatus": {"metrics": [{"value": "1"}]}}', "has no `name`"),
        (b'{"trainerStatus": {"metrics": [{"name": "current_step", "value": "soon"}]}}', "must be an integer"),
        (b'{"trainerStatus": {"metrics": [{"name": "current_step", "value": "-1"}]}}', "greater than or equal to 0"),
        (b" " * (BODY_MAX_BYTES + 1), "may have 65536"),
    ],
)
def test_a_body_of_another_shape_is_refused_with_what_is_wrong(text: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_kubeflow_report(text, attempt=1)
