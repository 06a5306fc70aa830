"""What the API server itself takes and refuses of a TrainingRun: by the schema, and by its rules in CEL."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain.api.loader import apply_assignment, load_documents, parse_assignment
from posttrain.api.schema import fill_defaults, resource_schema
from posttrain.api.validate import parse_training_run
from tests.cluster.any_cluster import Cluster
from tests.cluster.errors import ClusterError
from tests.integration.conftest import serve_runs
from tests.support.cluster_runs import ClusterRun, message_of, reasons

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))

GOOD: dict[str, Any] = {
    "apiVersion": "posttrain.dev/v1alpha1",
    "kind": "TrainingRun",
    "metadata": {"name": "distill"},
    "spec": {
        "model": {"source": "Qwen/Qwen2.5-1.5B-Instruct"},
        "datasets": [{"source": "open-r1/Mixture-of-Thoughts", "config": "all"}],
        "sft": {"args": {"learning_rate": 0.00004, "num_train_epochs": 5}},
        "parallelism": {"strategy": "ZeRO3"},
        "resources": {"numNodes": 2, "gpusPerNode": 8},
        "checkpoints": {"storage": {"size": "500Gi"}},
    },
}


@pytest.fixture(scope="module")
def api(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, which serves the resource."""
    serve_runs(cluster)
    yield cluster


def changed(*assignments: str, name: str = "distill") -> dict[str, Any]:
    """Return the good resource after these changes, written as for --set."""
    data = copy.deepcopy(GOOD)
    data["metadata"]["name"] = name
    for text in assignments:
        path, value = parse_assignment(text)
        data = apply_assignment(data, path=path, value=value)
    return data


def queued(*assignments: str) -> dict[str, Any]:
    """Return the good resource with a queue; as there is no Kueue here, whoever looks at it leaves it without quota."""
    return changed("spec.resources.queueName=team", *assignments)


def send(cluster: Cluster, namespace: str, *objects: dict[str, Any], flags: tuple[str, ...] = ()) -> str:
    """Apply objects as a user does, a document each."""
    text = "\n---\n".join(map(json.dumps, objects))
    return cluster.kubectl("apply", *flags, "--namespace", namespace, "--filename", "-", input=text)


# --- What is refused -------------------------------------------------------------------------------------------------

SUPPORTED = 'supported values: "'
BAD = [
    # what is changed, what the API server says of it
    ("metadata.name=2024-run", "letters, digits and hyphens, first a letter, last no hyphen"),
    (f"metadata.name={'a' * 41}", "a run's name has at most 40 characters"),
    ("spec.modle={}", 'unknown field "spec.modle"'),
    ("spec.model.source=s3://bucket/model", "spec.model.source in body should match '^((hf://)?"),
    ("spec.model.runRef={name: sft}", "exactly one of source and runRef says which model it is"),
    ("spec.model.dtype=fp16", f'spec.model.dtype: Unsupported value: "fp16": {SUPPORTED}auto", "float32"'),
    ("spec.model.trustRemoteCode='yes'", "trustRemoteCode in body must be of type boolean"),
    ("spec.datasets=[]", "spec.datasets in body should have at least 1 items"),
    ("spec.datasets[0].fraction=0.5", "spec.datasets[0].fraction in body must be of type string"),
    ("spec.datasets[0].fraction='1.5'", "spec.datasets[0].fraction in body should match '^(0"),
    ("spec.datasets[0].columns=[text, text]", 'spec.datasets[0].columns[1]: Duplicate value: "text"'),
    ("spec.datasets[0].rows={start: 3, end: 1}", "rows.end: Invalid value: end must be greater than start"),
    ("spec.evalDatasets=[{split: test}]", "spec.evalDatasets[0].source: Required value"),
    ("spec.sft.agrs={}", 'unknown field "spec.sft.agrs"'),
    ("spec.sft.args=[]", "spec.sft.args in body must be of type object"),
    ("spec.grpo={rewards: [{name: code}], sandbox: {mode: Piston}}", "mode Piston needs the addresses of its servers"),
    ("spec.grpo={rewards: [{name: code}], sandbox: {mode: Docker}}", f'Unsupported value: "Docker": {SUPPORTED}Local"'),
    ("spec.grpo={rewards: [{name: format}], rollout: {server: {}}}", "write mode Server, or leave server out"),
    ("spec.resources.gpusPerNode=65", "spec.resources.gpusPerNode in body should be less than or equal to 64"),
    ("spec.resources.memory=lots", "spec.resources.memory in body should match '^[0-9]+"),
    ("spec.resources.processesPerNode=9", "processesPerNode is more than gpusPerNode, and two ranks cannot share"),
    ("spec.resources.workloadPriorityClass=high", "workloadPriorityClass is the priority in a queue: set queueName"),
    ("spec.parallelism.strategy=ZeRO4", f'Unsupported value: "ZeRO4": {SUPPORTED}DDP", "ZeRO1", "ZeRO2"'),
    ("spec.parallelism={offload: Full}", "offload needs a sharding strategy: take strategy ZeRO1, ZeRO2 or ZeRO3"),
    ("spec.parallelism={strategy: ZeRO2, offload: Full}", "take offload Optimizer, or strategy ZeRO3"),
    ("spec.peft.method=LoRa", f'spec.peft.method: Unsupported value: "LoRa": {SUPPORTED}LoRA", "QLoRA"'),
    ("spec.callbacks=[{function: 'mine:Callback'}]", "and none is given: set spec.code"),
    ("spec.podOverrides={env: [{name: A, value: b}, {name: A, value: c}]}", "env[1]: Duplicate value"),
    ("spec.checkpoints.storage.claimName=mine", "exactly one of claimName (an existing claim) and size (a new one)"),
    ("spec.checkpoints.storage.accessMode=ReadWriteOnce", "take ReadWriteMany, or resources.numNodes 1"),
    ("spec.restarts={progressDeadlineSeconds: 1}", "progressDeadlineSeconds in body should be greater than or equal"),
    ("spec.activeDeadlineSeconds=1h", "spec.activeDeadlineSeconds in body must be of type integer"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[change[:40] for change, _ in BAD])
def test_a_resource_one_field_away_from_a_good_one_is_refused(
    api: Cluster, namespace: str, change: str, message: str
) -> None:
    with pytest.raises(ClusterError) as refused:
        send(api, namespace, changed(name="good"), changed(change), flags=("--dry-run=server",))

    assert message in str(refused.value)
    assert "trainingrun.posttrain.dev/good created (server dry run)" in str(refused.value)


# --- What may change -------------------------------------------------------------------------------------------------

CANNOT_CHANGE = "cannot change while the run lives: give the changed run another name, or delete this one first"
FIXED = [
    "spec.model.revision=v2",
    "spec.datasets[0].split=test",
    "spec.testFraction='0.1'",
    "spec.sft.args.learning_rate=0.1",
    "spec.sft.args.seed=7",
    "spec.peft={rank: 8}",
    "spec.resources.gpusPerNode=4",
    "spec.resources.memory=64Gi",
    "spec.checkpoints.storage.size=1Ti",
    "spec.prepare.enabled=false",
]
FREE = [
    "spec.suspend=true",
    "spec.ttlSecondsAfterFinished=60",
    "spec.activeDeadlineSeconds=3600",
    "spec.pendingDeadlineSeconds=600",
    "spec.restarts={maxInfrastructureRestarts: 1, avoidNodes: false}",
    "spec.checkpoints.everySteps=50",
    "spec.checkpoints.keepLast=5",
    "spec.resources.queueName=team-a",
    "spec.resources.profile=h100",
    "spec.resources.numNodes=3",
]
HELD = {"queueName": "team-b", "profile": "h100", "numNodes": 3}


@pytest.fixture
def stored(api: Cluster, namespace: str) -> Iterator[str]:
    """The namespace, in which the good resource is stored, with a queue."""
    send(api, namespace, queued())
    yield namespace


def test_what_a_run_is_cannot_be_edited(api: Cluster, stored: str) -> None:
    for change in FIXED:
        with pytest.raises(ClusterError) as refused:
            send(api, stored, queued(change), flags=("--dry-run=server",))
        field = change.partition("=")[0].removeprefix("spec.").partition("[")[0]
        told = field if field.startswith(("resources.", "checkpoints.")) else field.partition(".")[0]
        assert f"spec.{told.removesuffix('.size')}: Invalid value" in str(refused.value), change
        assert f"{told.removesuffix('.size')} {CANNOT_CHANGE}" in str(refused.value), change


def test_a_key_of_args_that_takes_the_place_of_another_is_refused_by_the_operator(run: ClusterRun) -> None:
    run.apply(sft={"args": {"max_steps": 20, "seed": 1}})
    run.await_running()

    # CEL's == counts the keys of a free-form object, and compares the values of those that both have.
    run.apply(sft={"args": {"max_steps": 20, "data_seed": 1}})

    told = run.await_status(lambda s: reasons(s)["Accepted"] == ("False", "SpecChanged"), what="the refusal")
    assert "change it back, or give the changed run another name" in message_of(told, "Accepted")
    assert len(run.pods(attempt=1)) == 2
    run.apply(sft={"args": {"max_steps": 20, "seed": 1}})
    run.await_status(lambda s: reasons(s)["Accepted"] == ("True", "Accepted"), what="the run on its way")
    assert run.complete()["attempt"] == 1


def test_how_long_and_how_often_can_be_edited(api: Cluster, stored: str) -> None:
    for change in FREE:
        assert "configured" in send(api, stored, queued(change), flags=("--dry-run=server",)), change


def test_of_what_a_grpo_run_learns_from_only_the_checks_can_be_edited(api: Cluster, namespace: str) -> None:
    good = changed("spec.grpo={rewards: [{name: accuracy}], args: {max_steps: 9}, signal: {deadReward: {steps: 5}}}")
    del good["spec"]["sft"]
    send(api, namespace, good)

    def edit(text: str) -> str:
        path, value = parse_assignment(text)
        return send(api, namespace, apply_assignment(good, path=path, value=value), flags=("--dry-run=server",))

    assert "configured" in edit("spec.grpo.signal.deadReward={policy: Fail, bound: '0.8'}")
    for change, said in (
        ("spec.grpo.rewards[0].weight='2'", f"grpo.rewards {CANNOT_CHANGE}"),
        ("spec.grpo.args.max_steps=10", f"grpo.args {CANNOT_CHANGE}"),
        ("spec.grpo.trainerClass=mine:Trainer", f"grpo.trainerClass {CANNOT_CHANGE}"),
        ("spec.grpo.rolloutFunction=mine:turns", f"grpo.rolloutFunction {CANNOT_CHANGE}"),
        ("spec.grpo.sandbox={mode: E2B}", "modes E2B and Morph need the Secret with their key in apiKeySecretRef"),
        ("spec.grpo.signal.deadReward.bound='1.5'", "spec.grpo.signal.deadReward.bound in body should match"),
        ("spec.grpo.signal.deadReward.policy=Ignore", f'Unsupported value: "Ignore": {SUPPORTED}Warn", "Suspend"'),
    ):
        with pytest.raises(ClusterError) as refused:
            edit(change)
        assert said in str(refused.value), change


def test_what_is_asked_of_a_queue_cannot_be_edited_while_quota_is_held(run: ClusterRun) -> None:
    run.apply()
    run.await_running()
    assert reasons(run.status())["QuotaReserved"] == ("True", "NoQueue")

    for field, value in HELD.items():
        with pytest.raises(ClusterError, match=f"resources.{field} can change only while the run holds no quota"):
            run.patch({"resources": {field: value}})


# --- What is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_api_server_stores_what_posttrain_plans_with(api: Cluster, namespace: str, file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    answer = json.loads(
        api.kubectl(
            *("apply", "--dry-run=server", "--output=json", "--namespace", namespace, "--filename", "-"), input=text
        )
    )
    resources = answer["items"] if answer["kind"] == "List" else [answer]

    for document, stored in zip(load_documents(text, origin=file.name), resources, strict=True):
        filled = fill_defaults(document.data["spec"], resource_schema()["properties"]["spec"])

        assert json.dumps(stored["spec"], sort_keys=True) == json.dumps(filled, sort_keys=True)
        resource = {**stored, "metadata": {"name": stored["metadata"]["name"]}}
        planned, read_back = parse_training_run(document.data), parse_training_run(resource)
        assert json.dumps(read_back.spec.to_data(), sort_keys=True) == json.dumps(
            planned.spec.to_data(), sort_keys=True
        )


SPELLINGS = """\
apiVersion: posttrain.dev/v1alpha1
kind: TrainingRun
metadata: {name: spellings}
spec:
  model: {source: org/model}
  datasets: [{source: org/data}]
  sft:
    args:
      exponent: 2e-5
      upper: 2E-5
      signed: 1.5e+3
      point: .5
      whole: 1.0
      thousand: 1e3
      small: 0.0000001
      large: 123456789012
      negative: -0.25
      octal: 0o17
      old_octal: 017
      hex: 0x1F
      underscore: 1_000
      "yes": yes
      "off": off
      "null": ~
      date: 2026-01-01
      sexagesimal: 12:30:45
      quoted: "2e-5"
      list: [1e-3, true, null]
"""


def read_by_kubectl(api: Cluster, namespace: str, text: str, *command: str) -> dict[str, Any]:
    """Return the args of a run as they would be stored."""
    into = ("--dry-run=server", "--output=json", "--namespace", namespace, "--filename", "-")
    args: dict[str, Any] = json.loads(api.kubectl(*command, *into, input=text))["spec"]["sft"]["args"]
    return args


@pytest.mark.parametrize("command", [("create",), ("apply", "--server-side")], ids=" ".join)
def test_files_are_read_as_kubectl_reads_them(api: Cluster, namespace: str, command: tuple[str, ...]) -> None:
    (document,) = load_documents(SPELLINGS, origin="spellings.yaml")

    args = read_by_kubectl(api, namespace, SPELLINGS, *command)

    assert json.dumps(args, sort_keys=True) == json.dumps(document.data["spec"]["sft"]["args"], sort_keys=True)
    assert args["exponent"] == 0.00002


def test_a_null_is_lost_where_kubectl_applies_on_its_own_side(api: Cluster, namespace: str) -> None:
    (document,) = load_documents(SPELLINGS, origin="spellings.yaml")

    args = read_by_kubectl(api, namespace, SPELLINGS, "apply")

    # The description of spec.sft.args says so.
    assert document.data["spec"]["sft"]["args"].keys() - args.keys() == {"null"}
