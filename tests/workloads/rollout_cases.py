"""Hand weights over to vLLM, in one process of vLLM's environment, and write down what it answers with them.

    python rollout_cases.py CASES.json OUT.json

CASES is `{verb: {...}}`, verbs being keys of RUN, run in their order; OUT maps each to what was found. One process,
because importing TRL and vLLM is slow.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from own_code.greedy import GREEDY, PROMPTS, TOKENS, colocated, equal, greedy


def main() -> None:
    cases, out = (Path(argument) for argument in sys.argv[1:])
    answers = {}
    for verb, case in json.loads(cases.read_text()).items():
        started = time.monotonic()
        answers[verb] = RUN[verb](**case)
        if os.environ.get("RANK", "0") == "0":
            print(f"{verb}: {time.monotonic() - started:.1f} s", flush=True)
            out.write_text(json.dumps(answers))


def hand_over(*, model: str, servers: list[str], port: int, times: int) -> list[dict[str, Any]]:
    """Change the model, and hand it over, `times` times; tell of every server whether it answers as the model does."""
    from posttrain_workloads.rollout_client import RolloutClient

    trained = load(model)
    client = RolloutClient(",".join(servers), group_port=port, connection_timeout=5)
    client.init_communicator("cpu")
    rounds = []
    for seed in range(times):
        change(trained, seed=seed)
        wanted = greedy(trained)
        before = equal(client, wanted)
        client.update_model_params(trained)
        client.reset_prefix_cache()
        rounds.append({"before": before, "after": equal(client, wanted), "version": client.version})
    client.close_communicator()
    return rounds


def shards(*, model: str, server: str, port: int) -> dict[str, Any]:
    """Hand a model over of which two ranks have a half each, by FSDP2; torchrun starts them.

    By as much of TRL's trainer as walks over the parameters: accelerate makes no FSDP on CPUs.
    """
    import torch
    import torch.distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from trl.generation.vllm_generation import VLLMGeneration

    from posttrain_workloads.rollout_client import RolloutClient

    torch.distributed.init_process_group("gloo")
    is_first = torch.distributed.get_rank() == 0
    trained = load(model)
    change(trained, seed=11)
    wanted = greedy(trained)
    mesh = init_device_mesh("cpu", (2,))
    for part in (*trained.model.layers, trained):
        fully_shard(part, mesh=mesh)
    walker = VLLMGeneration.__new__(VLLMGeneration)
    walker.model, walker.mode, walker._weight_metadata = trained, "server", None
    walker._dist = SimpleNamespace(is_fsdp=True, fsdp_version=2)
    walker.accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=is_first)
    answer: dict[str, Any] = {"halves": all(2 * p.to_local().numel() == p.numel() for p in trained.parameters())}
    if is_first:
        walker.vllm_client = RolloutClient(server, group_port=port, connection_timeout=5)
        walker.vllm_client.init_communicator("cpu")
        answer["before"] = equal(walker.vllm_client, wanted)
    walker.sync_weights()
    if is_first:
        answer["after"] = equal(walker.vllm_client, wanted)
        walker.vllm_client.close_communicator()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return answer


def spread(*, model: str, servers: list[str], port: int) -> dict[str, Any]:
    """Ask for two completions of each prompt after a hand-over."""
    from posttrain_workloads.rollout_client import RolloutClient

    trained = load(model)
    change(trained, seed=7)
    client = RolloutClient(",".join(servers), group_port=port, connection_timeout=5)
    client.init_communicator("cpu")
    with client.weight_update():
        for name, weight in trained.named_parameters():
            client.update_named_param(name, weight.data)
    client.reset_prefix_cache()
    output = client.generate(PROMPTS, n=2, **GREEDY | {"temperature": 1.0, "top_k": 1})  # vLLM refuses greedy with n=2
    client.close_communicator()
    wanted = [tokens for tokens in greedy(trained) for _ in range(2)]
    return {
        "prompts": output["prompt_ids"] == PROMPTS,
        "completions": output["completion_ids"] == wanted,
        "logprobs": [len(values) for values in output["logprobs"]],
        "servers": [origin.server for origin in client.origins],
        "versions": sorted({origin.weights == client.version for origin in client.origins}),
    }


def train(
    *, model: str, mode: str, folder: str, servers: list[str] | None = None, port: int = 0, drop: str = ""
) -> Any:
    """Train three steps with GRPO as TRL does it; `drop` is a file that is made after the first step."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from posttrain_workloads import _compat
    from posttrain_workloads.rollout_check import StaleRolloutWeights, bound_for
    from posttrain_workloads.rollout_differences import WORST, compare_rollouts

    class Drop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if drop:
                Path(drop).touch()

    if mode == "server":
        _compat.use_rollout_client()
    else:
        _compat.use_colocated_engine(dtype="float32", eager=True)
    trainer = compare_rollouts(GRPOTrainer, bound=bound_for("float32"))(
        model=model,
        reward_funcs=lambda completion_ids, **_: [float(sum(token % 2 for token in ids)) for ids in completion_ids],
        train_dataset=Dataset.from_dict({"prompt": [f"{a} plus {a + 1} is" for a in range(32)]}),
        callbacks=[Drop()],
        args=GRPOConfig(
            output_dir=folder,
            max_steps=3,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=TOKENS,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            bf16=False,
            use_cpu=True,
            model_init_kwargs={"dtype": "float32"},
            use_vllm=True,
            vllm_mode=mode,
            vllm_server_base_url=",".join(servers or []) or None,
            vllm_group_port=port,
            vllm_max_model_length=256,
        ),
    )
    stopped = None
    try:
        trainer.train()
    except StaleRolloutWeights as error:
        stopped = str(error)
    rollout = trainer.vllm_generation
    differences = [line[WORST] for line in trainer.state.log_history if WORST in line]
    answer = {"stopped": stopped, "differences": differences}
    if stopped is None:
        wanted = greedy(trainer.model)
        before = equal(rollout.vllm_client, wanted) if mode == "server" else [colocated(rollout.llm) == wanted]
        rollout.sync_weights()
        after = equal(rollout.vllm_client, wanted) if mode == "server" else [colocated(rollout.llm) == wanted]
        answer |= {"before": before, "after": after}
    if mode == "server":
        rollout.vllm_client.close_communicator()
    return answer


def pack(*, model: str) -> dict[str, list[bool]]:
    """Pack a model with an adapter as vLLM does for NCCL; tell which tensors then are those of the merged model.

    The trainer is as much of TRL's as walks over the parameters. Without our copies it tells why there are any.
    """
    import torch
    from accelerate import Accelerator
    from peft import LoraConfig, get_peft_model
    from trl.generation.vllm_generation import DistributedBackend, VLLMGeneration
    from vllm.distributed.weight_transfer.packed_tensor import pack_tensors

    from posttrain_workloads._compat import copy_as_they_are

    torch.manual_seed(0)
    trained = get_peft_model(load(model), LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    walker = VLLMGeneration.__new__(VLLMGeneration)
    walker.model, walker._dist = trained, DistributedBackend(Accelerator(cpu=True))
    wanted = [weight.clone() for _, weight in walker._iter_named_params()]
    found = {}
    for how, walk in (("copied", copy_as_they_are), ("plain", iter)):
        chunk = pack_tensors(walk(walker._iter_named_params()), lambda item: item[1], 2**30)
        parts = chunk.packed_tensor.split(chunk.tensor_sizes)
        found[how] = [
            torch.allclose(part.view(torch.float32), weight.view(-1), atol=1e-5)
            for part, weight in zip(parts, wanted, strict=True)
        ]
    return found


def rejoin(*, model: str, servers: list[str], port: int, pid: int) -> dict[str, Any]:
    """Kill the last server after a hand-over, ask for completions, and hand over anew: somebody starts it again."""
    import signal

    from posttrain_workloads.rollout_client import RolloutClient

    trained = load(model)
    client = RolloutClient(",".join(servers), group_port=port, connection_timeout=400)
    client.init_communicator("cpu")
    client.update_model_params(trained)
    os.killpg(pid, signal.SIGKILL)
    output = client.generate(PROMPTS, **GREEDY)
    answer = {
        "completions": output["completion_ids"] == greedy(trained),
        "servers": sorted({origin.server for origin in client.origins}),
    }
    change(trained, seed=3)
    client.update_model_params(trained)
    client.reset_prefix_cache()
    answer["after"] = equal(client, greedy(trained))
    client.close_communicator()
    return answer


def refuse(*, servers: list[str]) -> dict[str, str]:
    """Tell what is said to a server that is not there, and to a list that names one twice."""
    from posttrain_workloads.rollout_client import RolloutClient
    from posttrain_workloads.rollout_errors import RolloutError

    told = {}
    for name, urls in {"closed": "http://127.0.0.1:9", "twice": f"{servers[0]},{servers[0]}/"}.items():
        try:
            RolloutClient(urls, connection_timeout=1)
        except RolloutError as error:
            told[name] = f"{type(error).__name__}: {error}"
    try:
        RolloutClient(servers[0]).init_communicator("cuda")
    except RolloutError as error:
        told["backend"] = str(error)
    return told


def options(*, config: dict[str, Any], args: list[dict[str, Any]]) -> dict[str, Any]:
    """Tell what prepare finds wrong with options of `vllm serve`, and which of posttrain's own vLLM does not have."""
    from posttrain.api.servers import OWNED_OPTIONS
    from posttrain.contract.config import TrainingConfig
    from posttrain_workloads._compat import long_options
    from posttrain_workloads.problems import Findings
    from posttrain_workloads.server_options import build_parser, check_server_options

    told = []
    for given in args:
        config["spec"]["grpo"]["rollout"]["server"]["args"] = given
        findings = Findings()
        check_server_options(TrainingConfig.from_json(json.dumps(config)), findings)
        told.append([str(problem) for problem in findings.problems])
    return {"told": told, "missing": sorted(set(OWNED_OPTIONS) - set(long_options(build_parser())))}


# --- Parts -----------------------------------------------------------------------------------------------------------


def load(model: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype="float32")


def change(model: Any, *, seed: int) -> None:
    """Change every weight so much that greedy tokens change."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)


RUN = {
    "pack": pack,
    "options": options,
    "packed": hand_over,
    "rejoin": rejoin,
    "hand_over": hand_over,
    "spread": spread,
    "shards": shards,
    "refuse": refuse,
    "train": train,
    "train_dropped": train,
    "colocate": train,
}


if __name__ == "__main__":
    main()
