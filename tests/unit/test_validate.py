"""What a person is told about a resource that is not valid."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from posttrain.api.loader import apply_assignment, load_documents, parse_assignment
from posttrain.api.validate import check_training_run, parse_training_run
from posttrain.errors import InvalidResource, Problem

GOOD: dict[str, Any] = {
    "apiVersion": "posttrain.dev/v1alpha1",
    "kind": "TrainingRun",
    "metadata": {"name": "distill"},
    "spec": {
        "model": {"source": "Qwen/Qwen2.5-1.5B-Instruct", "eosToken": "<|im_end|>"},
        "datasets": [{"source": "open-r1/Mixture-of-Thoughts", "config": "all", "columns": ["messages"]}],
        "sft": {"args": {"learning_rate": 0.00004, "num_train_epochs": 5}},
        "parallelism": {"strategy": "ZeRO3"},
        "resources": {"numNodes": 2, "gpusPerNode": 8},
        "checkpoints": {"storage": {"size": "500Gi"}},
    },
}


def problems_of(data: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(InvalidResource) as caught:
        parse_training_run(data)
    return {problem.path: problem.message for problem in caught.value.problems}


def changed(*assignments: str) -> dict[str, Any]:
    data = copy.deepcopy(GOOD)
    for text in assignments:
        path, value = parse_assignment(text)
        data = apply_assignment(data, path=path, value=value)
    return data


def test_a_good_resource_has_its_defaults_and_its_args_coerced() -> None:
    run = parse_training_run(GOOD)

    assert run.metadata.name == "distill"
    assert run.spec.checkpoints.keep_last == 2
    assert run.spec.sft.args == {"learning_rate": 0.00004, "num_train_epochs": 5.0}
    assert isinstance(run.spec.sft.args["num_train_epochs"], float)


def test_the_data_that_was_given_is_left_as_it_was() -> None:
    data = copy.deepcopy(GOOD)
    data["spec"]["model"]["revision"] = None

    parse_training_run(data)

    assert data["spec"]["model"]["revision"] is None
    assert data["spec"]["sft"]["args"]["num_train_epochs"] == 5


BAD = [
    # a change to the good resource, the path that is named, what the message says
    ("apiVersion=posttrain.dev/v1", "apiVersion", 'must be posttrain.dev/v1alpha1, not the string "posttrain.dev/v1"'),
    ("apiVersion=", "apiVersion", "missing field: write apiVersion: posttrain.dev/v1alpha1"),
    ("kind=Pod", "kind", 'must be TrainingRun, not the string "Pod"'),
    ("metadata.name=My_Run", "metadata.name", 'last no hyphen; "my-run" would do'),
    (f"metadata.name={'a' * 41}", "metadata.name", f'"{"a" * 40}" would do'),
    ("metadata.name=2024-run", "metadata.name", 'first a letter, last no hyphen; "run" would do'),
    ("metadata.name=", "metadata.name", 'write the run\'s name, for example metadata: {"name": "my-run"}'),
    ("metadata=", "metadata", "missing field"),
    ("spec=", "spec", "missing field"),
    ("spec=training", "spec", "must be a mapping"),
    ("spec.sft=", "spec", "exactly one of sft (supervised fine-tuning) and grpo"),
    ("spec.sft.agrs={}", "spec.sft.agrs", "unknown field, did you mean `args`? Valid here: args and trainerClass"),
    ("spec.sft.args=[]", "spec.sft.args", "must be a mapping, not a list, []"),
    ("spec.sft.args.learning_rat=1e-4", "spec.sft.args.learning_rat", "did you mean learning_rate?"),
    ("spec.sft.args.learning_rate=fast", "spec.sft.args.learning_rate", "must be a number"),
    ("spec.sft.args.output_dir=/tmp", "spec.sft.args.output_dir", "is set by posttrain"),
    ("spec.sft.args.torch_dtype=bfloat16", "spec.sft.args.torch_dtype", "write spec.model.dtype"),
    ("spec.sft.args.eval_strategy=steps", "spec.sft.args.eval_strategy", "set spec.evalDatasets or spec.testFraction"),
    ("spec.model=", "spec.model", 'For example model: {"source": "Qwen/Qwen2.5-1.5B-Instruct"}'),
    ("spec.model.source=", "spec.model.source", "exactly one of source and runRef says which model it is"),
    ("spec.datasets[0].source=", "spec.datasets[0].source", "missing field: A Hub id"),
    ("spec.model.source=7", "spec.model.source", "must be a string, not the number 7: write it in quotes"),
    ("spec.model.source=/models/qwen", "spec.model.source", "is written file:///models/qwen"),
    ("spec.model.source=s3://bucket/qwen", "spec.model.source", "s3:// is not supported yet"),
    ("spec.model.source=pvc://Claim", "spec.model.source", "as in pvc://team-data/train.jsonl"),
    ("spec.model.source=https://huggingface.co/a/b", "spec.model.source", "of the Hub's address write only org/name"),
    ("spec.model.source=a b", "spec.model.source", "pvc://claim/path in a volume"),
    ("spec.model.trust_remote_code=true", "spec.model.trust_remote_code", "did you mean `trustRemoteCode`?"),
    ("spec.model.trustRemoteCode='true'", "spec.model.trustRemoteCode", "must be true or false, not the string"),
    ("spec.model.dtype=bf16", "spec.model.dtype", "must be one of auto, float32, bfloat16 or float16, not the string"),
    ("spec.model.chatTemplate=" + "x" * 65537, "spec.model.chatTemplate", "has 65537 characters, and at most 65536"),
    ("spec.model.eosToken=''", "spec.model.eosToken", 'is empty: write "<|im_end|>", or leave the field out'),
    ("spec.datasets=[]", "spec.datasets", "is empty: at least 1 is needed"),
    ("spec.datasets={source: a/b}", "spec.datasets", "must be a list, not a mapping"),
    ("spec.datasets[0].weight=0.5", "spec.datasets[0].weight", "did you mean `fraction`? Valid here: source, config"),
    ("spec.datasets[0].fraction=0.5", "spec.datasets[0].fraction", 'write it quoted, "0.5"'),
    ("spec.datasets[0].fraction='1.5'", "spec.datasets[0].fraction", '"1.5" is not a share above 0 and at most 1'),
    ("spec.datasets[0].columns=[a, a]", "spec.datasets[0].columns", '"a" is there twice'),
    ("spec.datasets[0].rows={start: 5, end: 5}", "spec.datasets[0].rows.end", "end must be greater than start"),
    ("spec.numNodes=2", "spec.numNodes", "unknown field, did you mean `spec.resources.numNodes`?"),
    ("spec.learning_rate=1e-4", "spec.learning_rate", "write it as `spec.sft.args.learning_rate`"),
    ("spec.dataset_mixture={}", "spec.dataset_mixture", "unknown field: write spec.datasets"),
    ("spec.paralellism={}", "spec.paralellism", "did you mean `parallelism`?"),
    ("spec.zebra=1", "spec.zebra", "unknown field; `posttrain explain spec` lists the valid ones"),
    ("spec.parallelism.strategy=zero3", "spec.parallelism.strategy", "did you mean ZeRO3?"),
    ("spec.parallelism={offload: Full}", "spec.parallelism.offload", "offload needs a sharding strategy"),
    ("spec.parallelism={strategy: ZeRO2, offload: Full}", "spec.parallelism.offload", "take offload Optimizer"),
    ("spec.parallelism={strategy: FSDP, offload: Optimizer}", "spec.parallelism.offload", "take offload Full"),
    ("spec.resources.gpusPerNode='8'", "spec.resources.gpusPerNode", "an integer from 0 to 64, not the string \"8\""),
    ("spec.resources.gpusPerNode=-1", "spec.resources.gpusPerNode", "from 0 to 64, not the number -1"),
    ("spec.resources.numNodes=1.5", "spec.resources.numNodes", "must be an integer from 1 to 1024, not the number 1.5"),
    ("spec.resources.processesPerNode=16", "spec.resources.processesPerNode", "two ranks cannot share a GPU"),
    ("spec.resources.cpu=16", "spec.resources.cpu", 'write it quoted, "16"'),
    ("spec.resources.memory=16 gigs", "spec.resources.memory", 'not a Kubernetes quantity such as "500m"'),
    ("spec.peft={dropout: 0.1}", "spec.peft.dropout", 'a decimal is a string here: write it quoted, "0.1"'),
    ("spec.code={}", "spec.code", "exactly one of configMapName and path"),
    ("spec.callbacks=[{function: 'mine:Callback'}]", "spec.code", "set spec.code"),
    ("spec.sft.trainerClass=Trainer", "spec.sft.trainerClass", 'of the form "module:Name"'),
    ("spec.checkpoints.storage={claimName: a, size: 1Gi}", "spec.checkpoints.storage", "exactly one of claimName"),
    ("spec.checkpoints.storage={claimName: a, accessMode: ReadWriteMany}", "spec.checkpoints.storage.claimName", "new"),
    ("spec.checkpoints.storage.accessMode=ReadWriteOnce", "spec.checkpoints.storage.accessMode", "is for one node"),
    ("spec.checkpoints.keepLast=0", "spec.checkpoints.keepLast", "from 1 to 1000, not the number 0"),
    ("spec.access.hubEndpoint=hub.example.com", "spec.access.hubEndpoint", "begins with https:// or http://"),
    ("spec.podOverrides.env=[{name: 1A, value: x}]", "spec.podOverrides.env[0].name", "does not begin with a digit"),
    ("spec.podOverrides.tolerations=[{value: x}]", "spec.podOverrides.tolerations[0].key", "set key"),
    ("spec.podOverrides.labels={team: 7}", "spec.podOverrides.labels.team", "must be a string, not the number 7"),
    ("spec.tracking.reportTo=[wandb]", "spec.tracking.reportTo[0]", "did you mean WandB?"),
    ("spec.tracking.reportTo=WandB", "spec.tracking.reportTo", "a list, not the string \"WandB\": put a hyphen"),
    # what an API server would refuse as well
    ("spec.podOverrides.env=[{name: A, value: x}, {name: A, value: b}]", "spec.podOverrides.env", '"A" is there twice'),
]  # fmt: skip


@pytest.mark.parametrize(("change", "path", "said"), BAD, ids=[f"{change[:50]}" for change, *_ in BAD])
def test_one_mistake_is_named_with_its_place_and_its_remedy(change: str, path: str, said: str) -> None:
    found = problems_of(changed(change))

    assert list(found) == [path]
    assert said in found[path]


def test_fsdp_and_qlora_without_gpus_are_refused_both() -> None:
    found = problems_of(
        changed("spec.resources.gpusPerNode=0", "spec.parallelism.strategy=FSDP", "spec.peft={method: QLoRA}")
    )

    assert set(found) == {"spec.parallelism.strategy", "spec.peft.method"}
    assert all("needs GPUs" in message for message in found.values())


def test_held_out_data_named_twice_is_refused() -> None:
    found = problems_of(changed("spec.testFraction='0.1'", "spec.evalDatasets=[{source: a/b}]"))

    assert found == {"spec.testFraction": "evalDatasets and testFraction both name held-out data: keep one of them"}


def test_all_kinds_of_problems_are_told_at_once() -> None:
    found = problems_of(
        changed(
            "spec.modle={}",
            "spec.model.dtype=fp16",
            "spec.sft.args.lr=1",
            "spec.sft.args.packing='yes'",
            "spec.datasets[0].fraction='2'",
            "spec.testFraction='0.1'",
            "spec.evalDatasets=[{source: a/b, rows: {start: 3, end: 1}}]",
            "spec.parallelism.offload=All",
        )
    )

    assert set(found) == {
        "spec.modle",
        "spec.model.dtype",
        "spec.sft.args.lr",
        "spec.sft.args.packing",
        "spec.datasets[0].fraction",
        "spec.testFraction",
        "spec.evalDatasets[0].rows.end",
        "spec.parallelism.offload",
    }


def test_a_rule_is_not_held_against_a_field_that_is_wrong_or_misspelt() -> None:
    assert list(problems_of(changed("spec.parallelism={stratgy: ZeRO3, offload: Optimizer}"))) == [
        "spec.parallelism.stratgy"
    ]
    assert list(problems_of(changed("spec.code=mine.py", "spec.callbacks=[{function: 'mine:Callback'}]"))) == [
        "spec.code"
    ]


def test_what_is_right_beside_a_mistake_is_kept_to_be_looked_at() -> None:
    checked = check_training_run(
        changed("spec.sft.args.lr=1", "spec.numNode=3", "spec.datasets[0].weight=1", "spec.resources.gpuPerNode=2")
    )

    assert len(checked.problems) == 4
    assert checked.run is not None
    assert checked.run.spec == parse_training_run(GOOD).spec
    assert checked.is_in_doubt("spec.sft.args.learning_rate")
    assert checked.is_in_doubt("spec.resources.gpusPerNode")
    assert not checked.is_in_doubt("spec.datasets[0].source")
    assert not checked.is_in_doubt("spec.resources.numNodes")


def test_nothing_is_kept_of_a_resource_that_lacks_what_it_needs() -> None:
    for change in ("spec.sft=", "spec.datasets=[]", "kind=Pod", "metadata.name=A_B", "spec.model.source=/x"):
        assert check_training_run(changed(change)).run is None


def test_a_resource_of_another_kind_is_not_judged_field_by_field() -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": []}}

    assert set(problems_of(pod)) == {"apiVersion", "kind"}


def test_an_empty_value_means_the_default_as_for_an_api_server() -> None:
    run = parse_training_run(changed("spec.datasets[0].split=", "spec.suspend=", "spec.model.revision="))

    assert run.spec.datasets[0].split == "train"
    assert run.spec.suspend is False
    assert run.spec.model.revision is None


def test_an_empty_value_within_args_is_the_users() -> None:
    run = parse_training_run(changed("spec.sft.args.max_length="))

    assert run.spec.sft.args["max_length"] is None


def test_lines_are_told_and_put_the_problems_in_order() -> None:
    text = """\
apiVersion: posttrain.dev/v1alpha1
kind: TrainingRun
metadata:
  name: distill
spec:
  model:
    revision: main
  datasets:
    - source: a/b
      fraction: 0.5
  sft:
    args:
      lr: 1
"""
    (document,) = load_documents(text, origin="run.yaml")
    with pytest.raises(InvalidResource) as caught:
        parse_training_run(document.data, origin="run.yaml", line_of=document.line_of)

    assert [(problem.line, problem.path) for problem in caught.value.problems] == [
        (6, "spec.model.source"),
        (10, "spec.datasets[0].fraction"),
        (13, "spec.sft.args.lr"),
    ]
    assert str(caught.value).splitlines()[1].startswith("run.yaml:10: spec.datasets[0].fraction: a decimal is")


def test_without_lines_the_file_is_told() -> None:
    with pytest.raises(InvalidResource) as caught:
        parse_training_run(changed("spec.suspend=1"), origin="run.yaml")

    assert caught.value.problems == (Problem(path="spec.suspend", message="must be true or false, not the number 1"),)
    assert str(caught.value) == "run.yaml: spec.suspend: must be true or false, not the number 1"
