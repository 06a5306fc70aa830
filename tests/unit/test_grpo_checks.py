"""What a grpo spec is told before anything runs: its method, rewards, parameters, groups and arguments."""

from __future__ import annotations

import json
from typing import Any

import pytest

from posttrain.api.explain import explain
from posttrain.api.training_run import TrainingRun
from posttrain.api.validate import parse_training_run
from posttrain.contract.config import TrainingConfig
from posttrain.errors import InvalidResource
from posttrain.plan.training_run import preview_training_run
from posttrain.settings import Profile, Settings
from tests.support.builders import T0


def build_resource(*, grpo: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "posttrain.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": "demo"},
        "spec": {
            "model": {"source": "org/model"},
            "datasets": [{"source": "org/problems"}],
            "grpo": {"rewards": [{"name": "accuracy"}], **(grpo or {})},
            "checkpoints": {"storage": {"size": "1Gi"}},
            **spec,
        },
    }


def problems_of(**fields: Any) -> dict[str, str]:
    with pytest.raises(InvalidResource) as refused:
        parse_training_run(build_resource(**fields))
    return {problem.path: problem.message for problem in refused.value.problems}


def assert_refused(path: str, said: str, **fields: Any) -> None:
    """See that a resource has this problem and no other."""
    found = problems_of(**fields)
    assert list(found) == [path]
    assert said in found[path]


def test_a_grpo_run_is_accepted_with_its_arguments_coerced() -> None:
    run = parse_training_run(build_resource(grpo={"args": {"learning_rate": 1, "loss_type": "dr_grpo"}}))
    assert isinstance(run, TrainingRun)
    assert run.spec.method == "grpo"
    assert run.spec.training.args == {"learning_rate": 1.0, "loss_type": "dr_grpo"}
    assert isinstance(run.spec.training.args["learning_rate"], float)


def test_sft_and_grpo_exclude_each_other_and_one_is_needed() -> None:
    said = "exactly one of sft (supervised fine-tuning) and grpo"
    assert said in problems_of(sft={})["spec"]
    both_missing = build_resource()
    del both_missing["spec"]["grpo"]
    with pytest.raises(InvalidResource, match="exactly one of sft"):
        parse_training_run(both_missing)


COLOCATE = {"mode": "Colocate"}
KEY = {"name": "e2b", "key": "api-key"}
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"rewards": []}, "spec.grpo.rewards", "is empty: at least 1 is needed"),
    ({"rewards": [{"name": "acuracy"}]}, "spec.grpo.rewards[0].name", "did you mean accuracy?"),
    ({"rewards": [{"weight": "1"}]}, "spec.grpo.rewards[0]", "exactly one of name"),
    ({"rewards": [{"name": "accuracy", "weight": 0.5}]}, "spec.grpo.rewards[0].weight", 'write it quoted, "0.5"'),
    ({"rolloutFunction": "mine:turns"}, "spec.code", "trainerClass and rolloutFunction are looked up in own code"),
    ({"rolloutFunction": "turns"}, "spec.grpo.rolloutFunction", 'of the form "module:Name"'),
    ({"rewards": [{"function": "mine:score"}]}, "spec.code", "a reward's function is looked up in own code"),
    (
        {"rewards": [{"name": "cosine", "params": {"max_length": 5}}]},
        "spec.grpo.rewards[0].params.max_length",
        "did you mean `max_len`?",
    ),
    (
        {"rewards": [{"name": "repetition_penalty", "params": {"max_penalty": 0.5}}]},
        "spec.grpo.rewards[0].params.max_penalty",
        "write -0.5",
    ),
    ({"sandbox": {"mode": "Piston"}}, "spec.grpo.sandbox.endpoints", "mode Piston needs the addresses of its servers"),
    ({"sandbox": {"endpoints": ["http://piston:2000"]}}, "spec.grpo.sandbox.endpoints", "and no other mode has any"),
    ({"sandbox": {"mode": "e2b"}}, "spec.grpo.sandbox.mode", "must be one of Local, Piston, E2B or Morph, not the str"),
    ({"sandbox": {"mode": "E2B"}}, "spec.grpo.sandbox.apiKeySecretRef", "modes E2B and Morph need the Secret with the"),
    ({"sandbox": {"apiKeySecretRef": KEY}}, "spec.grpo.sandbox.apiKeySecretRef", "and no other mode has one"),
    ({"sandbox": {"mode": "Morph", "apiKeySecretRef": KEY}}, "spec.grpo.sandbox.template", "mode Morph needs the snap"),
    ({"sandbox": {"template": "base"}}, "spec.grpo.sandbox.template", "template is for the machines of E2B and Morph"),
    (
        {"signal": {"klDivergence": {"policy": "Suspend"}}},
        "spec.grpo.signal.klDivergence.policy",
        "Suspend would never come: without a reference model (spec.grpo.args.beta is 0)",
    ),
    (
        {"signal": {"deadReward": {"bound": "1.5"}}},
        "spec.grpo.signal.deadReward.bound",
        "a share above 0 and at most 1",
    ),
    ({"signal": {"entropyCollapse": {"bound": 0.1}}}, "spec.grpo.signal.entropyCollapse.bound", "write it quoted"),
    ({"signal": {"deadRewards": {}}}, "spec.grpo.signal.deadRewards", "did you mean `deadReward`?"),
    ({"rollout": {"mode": "colocate"}}, "spec.grpo.rollout.mode", "did you mean Colocate?"),
    (
        {"args": {"vllm_importance_sampling_correction": False}},
        "spec.grpo.args.vllm_importance_sampling_correction",
        "this run's are by transformers: write spec.grpo.rollout.mode: Colocate, or leave the key out",
    ),
    (
        {"rollout": COLOCATE, "args": {"cache_implementation": "static"}},
        "spec.grpo.args.cache_implementation",
        "this run's are by vLLM: leave it out",
    ),
    (
        {"rollout": COLOCATE, "args": {"loss_type": "vespo"}},
        "spec.grpo.args.vllm_importance_sampling_mode",
        "write vllm_importance_sampling_mode: token_truncate or token_mask",
    ),
    (
        {"rollout": COLOCATE, "args": {"vllm_tensor_parallel_size": 2}},
        "spec.grpo.args.vllm_tensor_parallel_size",
        "2 does not divide the 1 ranks",
    ),
    (
        {"rollout": COLOCATE, "args": {"vllm_gpu_memory_utilization": 30}},
        "spec.grpo.args.vllm_gpu_memory_utilization",
        "write a number above 0, and at most 1",
    ),
    ({"args": {"max_length": 5}}, "spec.grpo.args.max_length", "a prompt is never cut"),
    ({"args": {"loss_type": "grop"}}, "spec.grpo.args.loss_type", 'did you mean "grpo"?'),
    ({"args": {"use_vllm": True}}, "spec.grpo.args.use_vllm", "it follows from spec.grpo.rollout"),
    ({"args": {"reward_weights": [1.0]}}, "spec.grpo.args.reward_weights", "write spec.grpo.rewards[].weight"),
    (
        {"args": {"num_generations": 5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}},
        "spec.grpo.args.num_generations",
        "do not fill up the 12 of a rollout (per_device_train_batch_size 4 x steps_per_generation 3 (by default "
        "gradient_accumulation_steps) x 1 rank): write 2, 3, 4, 6 or 12",
    ),
]


@pytest.mark.parametrize(("grpo", "path", "said"), BAD, ids=[path for _, path, _ in BAD])
def test_one_mistake_is_named_with_its_place_and_its_remedy(grpo: dict[str, Any], path: str, said: str) -> None:
    assert_refused(path, said, grpo=grpo)


BAD_WITH_VLLM: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({"model": {"source": "org/model", "config": {"rope_theta": 1e6}}}, {}, "spec.model.config", "its own config.json"),
    ({"peft": {"method": "QLoRA"}}, {}, "spec.peft.method", "write LoRA"),
    (
        {"resources": {"gpusPerNode": 0, "processesPerNode": 2}},
        {"vllm_tensor_parallel_size": 2},
        "spec.grpo.args.vllm_tensor_parallel_size",
        "spec.resources.gpusPerNode is 0: leave it out",
    ),
    (
        {"resources": {"gpusPerNode": 0}},
        {"vllm_enable_sleep_mode": True},
        "spec.grpo.args.vllm_enable_sleep_mode",
        "spec.resources.gpusPerNode is 0: leave it out",
    ),
]


@pytest.mark.parametrize(("spec", "args", "path", "said"), BAD_WITH_VLLM, ids=[path for *_, path, _ in BAD_WITH_VLLM])
def test_what_vllm_cannot_do_for_a_run_is_refused_with_what_can(
    spec: dict[str, Any], args: dict[str, Any], path: str, said: str
) -> None:
    assert_refused(path, said, grpo={"rollout": COLOCATE, "args": args}, **spec)


SERVER = {"mode": "Server", "server": {}}
BAD_SERVERS: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({"mode": "Colocate", "server": {}}, {}, "spec.grpo.rollout.server", "write mode Server, or leave server out"),
    ({"server": {}}, {}, "spec.grpo.rollout.server", "write mode Server, or leave server out"),
    ({"mode": "Server", "server": {"gpusPerNode": 0}}, {}, "spec.grpo.rollout.server.gpusPerNode", "from GPU to GPU"),
    (
        {"mode": "Server", "server": {"tensorParallelSize": 2}},
        {},
        "spec.grpo.rollout.server.tensorParallelSize",
        "a server has 1 GPUs: write at most 1",
    ),
    (
        {"mode": "Server", "server": {"dataParallelSize": 2}},
        {},
        "spec.grpo.rollout.server.dataParallelSize",
        "is 2, and a server has 1 GPUs: write at most 1",
    ),
    (
        {"mode": "Server", "server": {"gpusPerNode": 4, "dataParallelSize": 2, "tensorParallelSize": 4}},
        {},
        "spec.grpo.rollout.server.tensorParallelSize",
        "is 4, and a server has 4 GPUs for 2 copies of the model: write at most 2",
    ),
    (
        {"mode": "Server", "server": {"gpusPerNode": 4, "dataParallelSize": 2, "nodesPerReplica": 2}},
        {},
        "spec.grpo.rollout.server.dataParallelSize",
        "a server of 2 nodes has one copy: leave it out, and write replicas",
    ),
    (
        {"mode": "Server", "server": {"gpusPerNode": 4, "tensorParallelSize": 16, "nodesPerReplica": 2}},
        {},
        "spec.grpo.rollout.server.tensorParallelSize",
        "is 16, and a server has 8 GPUs: write at most 8",
    ),
    (
        {"mode": "Server", "server": {"gpusPerNode": 4, "tensorParallelSize": 3, "nodesPerReplica": 2}},
        {},
        "spec.grpo.rollout.server.tensorParallelSize",
        "each of a server's 2 nodes has as large a part: write a multiple of 2",
    ),
    (
        {"mode": "Server", "server": {"gpusPerNode": 8, "tensorParallelSize": 8, "nodesPerReplica": 2}},
        {},
        "spec.grpo.rollout.server.tensorParallelSize",
        "is 8, and 8 of a server's 16 GPUs would idle: write tensorParallelSize: 16 or gpusPerNode: 4",
    ),
    (
        {"mode": "Server", "server": {"gpusPerNode": 4, "dataParallelSize": 3}},
        {},
        "spec.grpo.rollout.server.dataParallelSize",
        "is 3, and 1 of a server's 4 GPUs would idle: write dataParallelSize: 4 or gpusPerNode: 3",
    ),
    (
        {"mode": "Server", "server": {"gpusPerNode": 8, "tensorParallelSize": 2}},
        {},
        "spec.grpo.rollout.server.tensorParallelSize",
        "and 6 of a server's 8 GPUs would idle: write tensorParallelSize: 8, dataParallelSize: 4 or gpusPerNode: 2",
    ),
    (
        {"mode": "Server", "server": {"gpusPerNode": 8, "tensorParallelSize": 2, "dataParallelSize": 3}},
        {},
        "spec.grpo.rollout.server.tensorParallelSize",
        "is 2 for each of 3 copies of the model, and 2 of a server's 8 GPUs would idle: write dataParallelSize: 4 or "
        "gpusPerNode: 6",
    ),
    (
        {"mode": "Server", "server": {"args": {"nnodes": 2}}},
        {},
        "spec.grpo.rollout.server.args.nnodes",
        "write spec.grpo.rollout.server.nodesPerReplica",
    ),
    (
        {"mode": "Server", "server": {"args": {"data-parallel-size": 2}}},
        {},
        "spec.grpo.rollout.server.args.data-parallel-size",
        "write spec.grpo.rollout.server.dataParallelSize",
    ),
    (
        {"mode": "Server", "server": {"args": {"--Max_Num_Seqs": 8}}},
        {},
        "spec.grpo.rollout.server.args.--Max_Num_Seqs",
        "write `max-num-seqs`",
    ),
    (
        {"mode": "Server", "server": {"args": {"dtype": "half"}}},
        {},
        "spec.grpo.rollout.server.args.dtype",
        "write spec.model.dtype",
    ),
    (
        {"mode": "Server", "server": {"args": {"no-trust-remote-code": True}}},
        {},
        "spec.grpo.rollout.server.args.no-trust-remote-code",
        "write spec.model.trustRemoteCode",
    ),
    (
        {"mode": "Server", "server": {"args": {"middleware": ["own.module", "--api-key"]}}},
        {},
        "spec.grpo.rollout.server.args.middleware",
        "--api-key would be read as another option",
    ),
    (
        {"mode": "Server", "server": {"args": {"enable-prefix-caching": False}}},
        {},
        "spec.grpo.rollout.server.args.enable-prefix-caching",
        "no-enable-prefix-caching",
    ),
    (
        SERVER,
        {"vllm_gpu_memory_utilization": 0.5},
        "spec.grpo.args.vllm_gpu_memory_utilization",
        "write gpu-memory-utilization into spec.grpo.rollout.server.args",
    ),
]


@pytest.mark.parametrize(("rollout", "args", "path", "said"), BAD_SERVERS, ids=[path for *_, path, _ in BAD_SERVERS])
def test_what_servers_cannot_be_is_refused_with_what_they_can(
    rollout: dict[str, Any], args: dict[str, Any], path: str, said: str
) -> None:
    assert_refused(path, said, grpo={"rollout": rollout, "args": args})


@pytest.mark.parametrize(
    ("seed", "said"),
    [
        ("7", 'an integer from 0 to 2,147,483,647, not the string "7"'),
        (7.5, "not the number 7.5"),
        (-1, "not the number -1"),
        (2**31, "not the number 2147483648"),
        (True, "not true"),
        ([7], "not a list, [7]"),
    ],
)
def test_a_servers_seed_is_a_number_that_others_can_be_added_to(seed: object, said: str) -> None:
    rollout = {"mode": "Server", "server": {"args": {"seed": seed}}}
    assert_refused("spec.grpo.rollout.server.args.seed", said, grpo={"rollout": rollout})


OWN = {"rolloutFunction": "turns:answer_twice"}


@pytest.mark.parametrize("given", [{"seed": 7}, '{"seed": 7}'], ids=["object", "text"])
@pytest.mark.parametrize(
    ("grpo", "said"),
    [
        ({"rollout": COLOCATE}, "would draw all those of a prompt with the same random numbers: leave it out"),
        ({"rollout": COLOCATE, **OWN}, "would draw all those of a prompt with the same random numbers: leave it out"),
        ({"rollout": SERVER, **OWN}, "leave it out; servers take one as seed in spec.grpo.rollout.server.args"),
        ({}, "does nothing, as transformers has no seed for a generation: leave it out"),
        ({"rollout": SERVER}, None),  # each server makes a different one for each completion
    ],
)
def test_a_seed_that_makes_a_group_of_one_completion_is_refused(
    grpo: dict[str, Any], said: str | None, given: object
) -> None:
    grpo = {**grpo, "args": {"generation_kwargs": given}}
    code = {"code": {"path": "./own"}} if "rolloutFunction" in grpo else {}
    if said is None:
        assert parse_training_run(build_resource(grpo=grpo, **code))
    else:
        assert_refused("spec.grpo.args.generation_kwargs.seed", said, grpo=grpo, **code)


@pytest.mark.parametrize("given", [{"seed": None}, {"seed": -1}, {"stop": ["x"]}, None])
def test_what_vllm_takes_for_no_seed_is_none(given: object) -> None:
    assert parse_training_run(build_resource(grpo={"rollout": COLOCATE, "args": {"generation_kwargs": given}}))


@pytest.mark.parametrize(
    ("rollout", "gpus", "of_server", "of_run"),
    [
        ({"mode": "Server"}, 8, 1, 9),
        ({"mode": "Server"}, 0, 0, 0),
        ({"mode": "Server", "server": {"replicas": 2}}, 0, 0, 0),
        ({"mode": "Server", "server": {"replicas": 2}}, 1, 1, 3),
        ({"mode": "Server", "server": {"replicas": 2, "gpusPerNode": 4}}, 8, 4, 16),
        ({"mode": "Server", "server": {"replicas": 2, "gpusPerNode": 4, "nodesPerReplica": 2}}, 8, 4, 24),
        (COLOCATE, 8, 0, 8),
    ],
)
def test_a_server_has_one_gpu_or_as_the_gang_none_where_nothing_else_is_said(
    rollout: dict[str, Any], gpus: int, of_server: int, of_run: int
) -> None:
    spec = parse_training_run(build_resource(grpo={"rollout": rollout}, resources={"gpusPerNode": gpus})).spec

    assert (spec.server_gpus, spec.gpus) == (of_server, of_run)


@pytest.mark.parametrize(
    ("gpus", "server", "of_a_model", "on_a_node"),
    [
        (8, {"gpusPerNode": 8, "dataParallelSize": 2}, 4, 8),
        (8, {"gpusPerNode": 8, "dataParallelSize": 4, "tensorParallelSize": 2}, 2, 8),
        (0, {"dataParallelSize": 2, "tensorParallelSize": 2}, 2, 4),
        (0, {"dataParallelSize": 2}, 1, 2),
        (8, {"gpusPerNode": 8, "nodesPerReplica": 2}, 16, 8),
        (8, {"gpusPerNode": 4, "nodesPerReplica": 2, "tensorParallelSize": 8}, 8, 4),
        (0, {"nodesPerReplica": 2}, 2, 1),
    ],
)
def test_the_gpus_of_a_server_are_shared_by_copies_and_parts_of_the_model(
    gpus: int, server: dict[str, Any], of_a_model: int, on_a_node: int
) -> None:
    grpo = {"rollout": {"mode": "Server", "server": server}}
    spec = parse_training_run(build_resource(grpo=grpo, resources={"gpusPerNode": gpus})).spec

    assert (spec.server_engine_size, spec.server_ranks_per_node) == (of_a_model, on_a_node)


def test_a_server_without_gpus_is_split_over_as_many_processes_as_asked_for() -> None:
    rollout = {"mode": "Server", "server": {"tensorParallelSize": 2}}
    spec = parse_training_run(build_resource(grpo={"rollout": rollout}, resources={"gpusPerNode": 0})).spec

    assert (spec.server_gpus, spec.server_engine_size) == (0, 2)


@pytest.mark.parametrize(
    ("rollout", "image"), [({}, "trainer"), ({"mode": "Transformers"}, "trainer"), (COLOCATE, "vllm")]
)
def test_a_run_whose_completions_come_from_vllm_is_planned_with_its_image(rollout: dict[str, Any], image: str) -> None:
    run = parse_training_run(build_resource(grpo={"rollout": rollout}))
    settings = Settings()
    objects = {manifest["kind"]: manifest for manifest in preview_training_run(run, now=T0, settings=settings)}
    trainer = objects["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    prepare = objects["Job"]["spec"]["template"]["spec"]["containers"][0]
    wanted = settings.images.vllm if image == "vllm" else settings.images.trainer
    assert (trainer["image"], prepare["image"]) == (wanted, wanted)


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_nodes_of_a_server_are_placed_near_each_other(nodes: int) -> None:
    rollout = {"mode": "Server", "server": {"nodesPerReplica": nodes}}
    run = parse_training_run(build_resource(grpo={"rollout": rollout}))
    settings = Settings(profiles={"default": Profile(topology_key="rack")})
    (servers,) = (m for m in preview_training_run(run, now=T0, settings=settings) if m["kind"] == "StatefulSet")
    pod = servers["spec"]["template"]["spec"]

    assert servers["spec"]["replicas"] == nodes
    assert ("affinity" in pod) is (nodes > 1)
    if nodes > 1:
        (wish,) = pod["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        assert wish["podAffinityTerm"] == {
            "topologyKey": "rack",
            "labelSelector": {"matchLabels": servers["spec"]["template"]["metadata"]["labels"]},
        }


def test_a_reward_that_compares_completions_needs_whole_groups_on_a_rank() -> None:
    args = {"num_generations": 8, "per_device_train_batch_size": 4}
    ranks = {"gpusPerNode": 2}
    assert parse_training_run(build_resource(grpo={"args": args}, resources=ranks))
    found = problems_of(grpo={"args": args, "rewards": [{"name": "length"}]}, resources=ranks)
    said = "reward length compares the completions of a prompt, and a rank makes 4"
    assert said in found["spec.grpo.args.num_generations"]


EVALUATED: list[tuple[dict[str, Any], list[str], int, str | None]] = [
    ({"per_device_eval_batch_size": 6}, ["accuracy"], 4, None),
    ({"per_device_eval_batch_size": 6, "eval_strategy": "no"}, ["accuracy"], 1, None),
    (
        {"per_device_eval_batch_size": 6},
        ["accuracy"],
        2,
        "8 completions of each prompt (num_generations_eval, by default num_generations), and 2 ranks make 12 at once, "
        "which are no whole groups: write 8, or for num_generations_eval 1, 2, 3, 4, 6 or 12",
    ),
    (
        {"per_device_eval_batch_size": 4},
        ["accuracy", "length"],
        2,
        "reward length compares those of a prompt, and a rank makes 4, which are no whole groups: write 8, or for "
        "num_generations_eval 1, 2 or 4",
    ),
    ({"per_device_eval_batch_size": 4, "num_generations_eval": 2}, ["length"], 2, None),
    ({"per_device_eval_batch_size": 8}, ["length"], 2, None),
]


@pytest.mark.parametrize(("args", "rewards", "ranks", "said"), EVALUATED)
def test_an_evaluation_needs_whole_groups_too(
    args: dict[str, Any], rewards: list[str], ranks: int, said: str | None
) -> None:
    grpo = {
        "args": {"num_generations": 8, "per_device_train_batch_size": 8, "eval_strategy": "steps", **args},
        "rewards": [{"name": name} for name in rewards],
    }
    more = {"resources": {"gpusPerNode": ranks}, "testFraction": "0.1"}
    if said is None:
        assert parse_training_run(build_resource(grpo=grpo, **more))
    else:
        assert_refused("spec.grpo.args.per_device_eval_batch_size", said, grpo=grpo, **more)


def test_a_prompt_column_is_for_grpo() -> None:
    data = build_resource(promptColumn="problem")
    data["spec"]["sft"] = {}
    del data["spec"]["grpo"]
    with pytest.raises(InvalidResource, match="promptColumn is for grpo"):
        parse_training_run(data)


def test_a_grpo_run_is_planned_to_ranks_that_run_grpo() -> None:
    run = parse_training_run(build_resource(promptColumn="problem"))
    objects = {manifest["kind"]: manifest for manifest in preview_training_run(run, now=T0, settings=Settings())}
    pod = objects["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    assert pod["containers"][0]["command"] == ["python", "-m", "posttrain_workloads.launch", "grpo"]
    config = TrainingConfig.model_validate(json.loads(objects["ConfigMap"]["data"]["config.json"]))
    assert (config.method, config.spec.prompt_column) == ("grpo", "problem")


def test_the_arguments_of_grpo_are_explained() -> None:
    assert explain("spec.grpo.args").type.startswith("keys of trl.GRPOConfig")
    assert explain("spec.grpo.args.loss_type").default == '"dapo"'


CODE = {"rewards": [{"name": "code"}, {"name": "format"}]}


def test_only_rewards_that_run_programs_have_a_sandbox_and_by_default_its_posttrains_own() -> None:
    without = parse_training_run(build_resource(grpo={"sandbox": {"concurrency": 8}})).spec
    default = parse_training_run(build_resource(grpo=CODE)).spec
    piston = {"mode": "Piston", "endpoints": ["http://piston:2000", "http://piston:2001/api/v2"]}
    others = parse_training_run(build_resource(grpo={**CODE, "sandbox": piston})).spec

    assert without.used_sandbox is None
    assert default.used_sandbox is not None
    assert (default.used_sandbox.mode, default.used_sandbox.concurrency) == ("Local", 4)
    assert others.used_sandbox is not None
    assert others.used_sandbox.to_data()["endpoints"] == piston["endpoints"]


def planned_of(grpo: dict[str, Any]) -> tuple[set[str], set[str | None]]:
    """Return the kinds of a run's objects, and where its gang sends programs to."""
    objects = preview_training_run(parse_training_run(build_resource(grpo=grpo)), now=T0, settings=Settings())
    (job,) = (manifest for manifest in objects if manifest["kind"] == "PyTorchJob")
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    urls = {variable.get("value") for variable in container["env"] if variable["name"] == "POSTTRAIN_SANDBOX_URLS"}
    return {manifest["kind"] for manifest in objects}, urls


def test_servers_of_ones_own_take_the_place_of_the_sandbox() -> None:
    piston = {"mode": "Piston", "endpoints": ["http://piston:2000", "http://piston:2001/api/v2"]}

    own_kinds, own_urls = planned_of(CODE)
    kinds, urls = planned_of({**CODE, "sandbox": piston})

    assert own_kinds - kinds == {"Deployment", "Service"}
    assert own_urls == {"http://demo-sandbox:2000"}
    assert urls == {"http://piston:2000,http://piston:2001/api/v2"}
    assert planned_of({})[1] == set()


def test_the_machines_of_a_service_need_no_objects_and_their_key_reaches_prepare_and_the_gang_from_its_secret() -> None:
    grpo = {**CODE, "sandbox": {"mode": "E2B", "apiKeySecretRef": KEY}}

    kinds, urls = planned_of(grpo)

    assert (kinds & {"Deployment", "Service"}, urls) == (planned_of({})[0] & {"Deployment", "Service"}, set())
    objects = preview_training_run(parse_training_run(build_resource(grpo=grpo)), now=T0, settings=Settings())
    (prepare,) = (manifest for manifest in objects if manifest["kind"] == "Job")
    (job,) = (manifest for manifest in objects if manifest["kind"] == "PyTorchJob")
    for template in (prepare["spec"]["template"], job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]):
        (container,) = template["spec"]["containers"]
        given = [variable for variable in container["env"] if variable["name"] == "POSTTRAIN_SANDBOX_KEY"]
        assert given == [{"name": "POSTTRAIN_SANDBOX_KEY", "valueFrom": {"secretKeyRef": KEY}}]
