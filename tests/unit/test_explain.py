"""What `posttrain explain` tells."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from posttrain.api.args import load_table
from posttrain.api.explain import Entry, Explanation, UnknownField, explain
from posttrain.api.schema import Node, resource_schema


def all_paths(node: Node, path: str) -> Iterator[str]:
    inner = node.get("items", node)
    for name, part in inner.get("properties", {}).items():
        yield f"{path}.{name}".removeprefix(".")
        yield from all_paths(part, f"{path}.{name}")


def test_a_field() -> None:
    assert explain("spec.resources.numNodes") == Explanation(
        path="spec.resources.numNodes",
        type="integer, 1 to 1024",
        description="Number of nodes, one pod each. Default: 1.",
        required=False,
        mutable=False,
        mutable_without_quota=True,
        default="1",
        example="1",
    )


def test_an_object_lists_its_fields() -> None:
    explanation = explain("spec.datasets[0].rows")

    assert [entry.name for entry in explanation.fields] == ["start", "end"]
    assert explanation.fields[0] == Entry(
        name="start", type="integer, 0 to 9007199254740992", required=False, summary="First row, from 0."
    )


@pytest.mark.parametrize("path", ["", "TrainingRun", "trainingrun", "trun"])
def test_the_whole_resource(path: str) -> None:
    explanation = explain(path)

    assert explanation.path == "TrainingRun"
    assert [entry.name for entry in explanation.fields] == ["apiVersion", "kind", "metadata", "spec", "status"]


def test_which_fields_may_change() -> None:
    mutable = {path for path in all_paths(resource_schema(), "") if explain(path).mutable and path.count(".") < 3}

    assert mutable == {
        "spec.suspend", "spec.ttlSecondsAfterFinished", "spec.activeDeadlineSeconds", "spec.pendingDeadlineSeconds",
        "spec.restarts", "spec.restarts.maxInfrastructureRestarts", "spec.restarts.maxApplicationRestarts",
        "spec.restarts.progressDeadlineSeconds", "spec.restarts.onNonFinite", "spec.restarts.avoidNodes",
        "spec.checkpoints.everySteps", "spec.checkpoints.keepLast", "spec.grpo.signal",
    }  # fmt: skip
    assert {path for path in all_paths(resource_schema(), "") if explain(path).mutable_without_quota} == {
        "spec.resources.queueName", "spec.resources.workloadPriorityClass", "spec.resources.profile",
        "spec.resources.numNodes",
    }  # fmt: skip


def test_every_path_and_every_key_can_be_explained() -> None:
    for path in [*all_paths(resource_schema(), ""), *(f"spec.sft.args.{key}" for key in load_table("sft_config").keys)]:
        assert explain(path).description, path
        assert explain(path).render().startswith(path)


def test_the_args_are_the_keys_that_a_user_may_set() -> None:
    explanation = explain("spec.sft.args")

    names = [entry.name for entry in explanation.fields]
    assert "learning_rate" in names
    assert "output_dir" not in names
    assert explanation.type.startswith("keys of trl.SFTConfig")


def test_a_training_argument() -> None:
    explanation = explain("spec.sft.args.learning_rate")

    assert (explanation.type, explanation.default) == ("a number", "2e-05")
    assert "learning rate" in explanation.description


def test_an_argument_that_posttrain_sets() -> None:
    assert explain("spec.sft.args.output_dir").description.startswith("Set by posttrain: ")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("spec.modle", "spec.modle: no such field, did you mean spec.model?"),
        ("spec.resources.num_nodes", "did you mean spec.resources.numNodes?"),
        ("zebra", "zebra: no such field: a path begins with apiVersion, kind, metadata, spec or status"),
        ("sft", "sft: no such field, did you mean spec.sft?"),
        ("packing", "packing: no such field, did you mean spec.sft.args.packing?"),
        ("num_nodes", "did you mean spec.resources.numNodes?"),
        ("revision", "did you mean spec.model.revision, spec.datasets.revision or spec.evalDatasets.revision?"),
        ("spec.peft.zebra", "spec.peft.zebra: no such field; spec.peft has method, rank"),
        ("spec.model.source.path", "spec.model.source has no fields"),
        ("spec.sft.args.learning_rat", "did you mean spec.sft.args.learning_rate?"),
        ("spec.sft.args.max_seq_length", "it is called max_length now"),
        ("spec.sft.args.zebra", "is no key of trl.SFTConfig; `posttrain explain spec.sft.args`"),
    ],
)
def test_an_unknown_path_names_the_nearest(path: str, said: str) -> None:
    with pytest.raises(UnknownField) as caught:
        explain(path)

    assert said in str(caught.value)


def test_plain_text() -> None:
    assert explain("spec.datasets.rows.end").render() == (
        "spec.datasets.rows.end  (integer, 1 to 9007199254740992)\n"
        "\n"
        "  Row after the last one. Default: all.\n"
        "\n"
        "  Example: 1000\n"
    )
    assert explain("spec.suspend").render().startswith("spec.suspend  (boolean; may change while the run lives)\n")
    lines = explain("spec.code").render().splitlines()
    assert lines[-3:] == [
        "  Fields:",
        "    configMapName  (string, at most 253 characters) ConfigMap whose keys are Python files.",
        "    path           (string, at most 1024 characters) Folder on this machine (local runs only), absolute or "
        "relative to the resource's file.",
    ]
