"""What a person sees of runs who has nothing but kubectl."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from posttrain.api.training_run import TrainingRunSpec
from posttrain.contract.facts import CheckpointSaved, Logged, Started
from posttrain.contract.result import Result, to_termination_message
from tests.cluster.any_cluster import Cluster
from tests.cluster.errors import ClusterError
from tests.support.builders import build_report
from tests.support.cluster_runs import ClusterRun, message_of, reasons
from tests.support.operator_process import OperatorProcess

pytestmark = pytest.mark.integration

WRONG = to_termination_message(Result(reason="ConfigInvalid", message="max_length must be positive", rank=0))
EMPTY = {"PROGRESS": "", "STEP": "", "ETA": "", "METRIC": ""}
WIDE = ("--output", "wide")


def columns(run: ClusterRun, *flags: str) -> dict[str, str]:
    """Return what `kubectl get trun` shows of a run, by column."""
    header, line = run.kubectl("get", "trun", run.name, *flags).splitlines()
    starts = [found.start() for found in re.finditer(r"\S+", header)]
    ends = [*starts[1:], None]
    return {header[a:b].strip(): line[a:b].strip() for a, b in zip(starts, ends, strict=True)}


def test_columns_show_where_a_run_is(cluster: Cluster, operator: OperatorProcess, run: ClusterRun) -> None:
    run.apply()
    run.await_running()
    starting = columns(run)
    assert re.fullmatch(r"\d+s", starting.pop("AGE"))
    about = {"NAME": "demo", "METHOD": "SFT", "MODEL": "pvc://inputs/model", "GPUS": "2"}
    assert starting == {**about, "STATE": "Starting", **EMPTY}

    facts = (
        Started(world_size=2, max_steps=20, resumed_from_step=0),
        Logged(step=5, metrics={"loss": "0.2513739094829559", "grad_norm": "1.5"}),
        CheckpointSaved(step=5, uri="pvc://shared/demo/checkpoint-5", bytes=10, digest="sha256:0"),
    )
    operator.report(cluster, run.namespace, "demo-a1-master-0", build_report(*facts, step=5))
    run.await_status(lambda s: (s.get("checkpoints") or {}).get("latestStep") == 5, what="checkpoint 5")
    # A rate, hence an end to be expected, is known with the progress server's second write, half a minute later.
    patch = json.dumps({"status": {"progress": {"eta": "1m35s"}}})
    run.kubectl("patch", "trun", run.name, "--subresource=status", "--type=merge", "--patch", patch)
    training = columns(run, *WIDE)
    del training["AGE"]
    progress = {"PROGRESS": "25", "STEP": "5", "ETA": "1m35s", "METRIC": "0.2514"}
    more = {"REASON": "InProgress", "RESTARTS": "0", "CHECKPOINT": "5"}
    assert training == {**about, "STATE": "Training", **progress, **more}

    run.patch({"suspend": True})
    run.await_stage("Suspended")
    suspended = columns(run, *WIDE)
    assert (suspended["STATE"], suspended["REASON"], suspended["STEP"]) == ("Suspended", "Suspended", "5")

    run.patch({"suspend": False})
    run.await_running(attempt=2)
    run.complete(attempt=2)
    ended = columns(run, *WIDE)
    assert (ended["STATE"], ended["REASON"], ended["CHECKPOINT"]) == ("Succeeded", "Completed", "5")


def test_describe_tells_what_happened(run: ClusterRun) -> None:
    run.apply(restarts={"maxInfrastructureRestarts": 1})
    run.await_running()
    killed = to_termination_message(Result(reason="RankKilled", message="rank 1 was killed by signal 9", rank=1))
    run.end_pod(1, exit_code=138, message=killed)
    run.await_running(attempt=2)
    run.end_pod(0, attempt=2, exit_code=2, message=WRONG)
    run.await_stage("Failed")

    told = run.kubectl("describe", "trun", run.name).partition("\nEvents:\n")[2]

    # TYPE, REASON, AGE, FROM and the message, which is the only one with blanks; what happened within a second is in
    # no order.
    events = [re.split(r"\s{2,}", line.strip(), maxsplit=4) for line in told.splitlines()[2:]]
    assert sorted((event[0], event[1], re.sub(r" on node \S+:", ":", event[4])) for event in events) == [
        ("Normal", "Accepted", "The spec is valid and its references resolve."),
        ("Normal", "AllPodsRunning", "Every pod of the gang runs."),
        ("Normal", "AllPodsRunning", "Every pod of the gang runs."),
        ("Warning", "ConfigInvalid", "attempt 2, pod demo-a2-master-0: max_length must be positive (exit code 2)"),
        (
            "Warning",
            "RankKilled",
            "attempt 1, pod demo-a1-worker-0: rank 1 was killed by signal 9 (exit code 138); attempt 2 follows",
        ),
    ]
    assert {event[3] for event in events} == {"posttrain"}


def test_explain_knows_every_field_of_the_spec(run: ClusterRun) -> None:
    told = run.kubectl("explain", "trainingrun.spec", "--recursive")

    found = re.findall(r"^  (\w+)\t<", told, flags=re.MULTILINE)
    assert set(found) == {field.alias for field in TrainingRunSpec.model_fields.values()}
    assert "enum: Always, Never" in told


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("resources.gpusPerNode", "GPUs of each node; 0 trains on the CPU. Default: 1. Example: 8"),
        ("checkpoints.storage.size", 'Size of a claim made for the run. Example: "500Gi"'),
        ("sft.args", "`posttrain explain spec.sft.args` lists them."),
        ("restarts.maxInfrastructureRestarts", "Gang restarts after lost nodes, evictions and killed ranks."),
    ],
)
def test_explain_says_what_a_field_means_with_an_example(run: ClusterRun, field: str, said: str) -> None:
    told = " ".join(run.kubectl("explain", f"trun.spec.{field}").split())

    assert said in told
    assert "Example: " in told


def test_waiting_for_finished_returns_in_both_outcomes(run: ClusterRun) -> None:
    other = ClusterRun(run.cluster, run.namespace, "other")
    for started in (run, other):
        started.apply()
    for started in (run, other):
        started.await_running()
    with ThreadPoolExecutor() as pool:
        waits = ("wait", "--for=condition=Finished", "trun", "demo", "other", "--timeout=60s")
        waiting = pool.submit(run.kubectl, *waits)
        run.complete()
        other.end_pod(0, exit_code=2, message=WRONG)

        said = waiting.result()

    assert said.splitlines() == [f"trainingrun.posttrain.dev/{name} condition met" for name in ("demo", "other")]
    assert reasons(other.status())["Succeeded"] == ("False", "ConfigInvalid")
    with pytest.raises(ClusterError, match="timed out"):
        run.kubectl("wait", "--for=condition=Succeeded", "trun", "other", "--timeout=1s")


def test_a_wrong_value_inside_args_is_told_with_what_to_do(run: ClusterRun) -> None:
    run.apply(sft={"args": {"learning_rate": "fast"}})
    told = run.await_status(lambda s: reasons(s)["Accepted"][1] == "InvalidSpec", what="the refusal")
    assert message_of(told, "Accepted").startswith("spec.sft.args.learning_rate: must be a number")
    assert columns(run, *WIDE)["REASON"] == "InvalidSpec"

    # What the API server cannot judge it cannot let be edited either.
    with pytest.raises(ClusterError, match="sft cannot change while the run lives"):
        run.apply(sft={"args": {"learning_rate": 1}})
    run.kubectl("delete", "trun", run.name)
    run.apply(sft={"args": {"learning_rate": 1}})

    run.await_running()
