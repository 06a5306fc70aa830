"""What a workload posts, and where: the last part of the address tells which of the two reports the body is.

It owns how a body becomes a report; it must not decide what becomes of it, nor who may send it.
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import ValidationError

from posttrain.contract.facts import BODY_MAX_BYTES, VALUE_MAX_LENGTH, FactsReport
from posttrain.contract.progress import KubeflowReport, parse_kubeflow_report

Endpoint = Literal["status", "facts"]
"""`status` takes what transformers' KubeflowCallback posts, `facts` a FactsReport."""

ENDPOINTS: tuple[Endpoint, ...] = get_args(Endpoint)

Report = FactsReport | KubeflowReport


def parse_report(body: bytes, *, endpoint: Endpoint, attempt: int) -> Report | None:
    """Return the report in a body, or None where nothing follows from it; `attempt` is what the sender proved.

    Raises:
        ValueError: the body is not what belongs to that endpoint; the message says why.
    """
    if endpoint == "status":
        return parse_kubeflow_report(body, attempt=attempt)
    if len(body) > BODY_MAX_BYTES:
        raise ValueError(f"the body has {len(body)} bytes and may have {BODY_MAX_BYTES}")
    try:
        report = FactsReport.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:VALUE_MAX_LENGTH] for part in first["loc"]) or "the body"
        raise ValueError(f"the body is no FactsReport: {where}: {first['msg']}") from None
    if report.attempt != attempt:
        raise ValueError(f"the body is of attempt {report.attempt} and the token of attempt {attempt}")
    return report
