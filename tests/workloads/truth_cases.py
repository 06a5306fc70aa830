"""Run GRPO on fixed completions with many sets of arguments, beside the reference; in the trainer's environment.

    python truth_cases.py CASES.json OUT.json

CASES is `{model, code, prompts, cases, mutants}`: each case `{name, config, storage, rewards, weights}`, each mutant
`{name, of, to}`, a change in the reference's source. OUT tells how far each case is from the reference, and how far
from each mutant. `model` is made. One process, because importing TRL is slow.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

REFERENCE = Path(__file__).with_name("_grpo_reference.py")
SLOPES = 2


def main() -> None:
    given, out = (Path(argument) for argument in sys.argv[1:])
    asked = json.loads(given.read_text())
    sys.path[:0] = [asked["code"]]
    make_model(Path(asked["model"]))
    source = REFERENCE.read_text()
    reference = build_reference(source)
    truth = Truth(Path(asked["model"]), asked["prompts"])
    gc.freeze()  # the libraries' objects are not to be gone through once for each trainer
    measured = [(case, measure(case)) for case in asked["cases"]]
    checked = [(case, [truth.inputs_of(case, step) for step in steps]) for case, steps in measured]
    found: dict[str, Any] = {
        "cases": {case["name"]: compare(case, steps, reference) for case, steps in checked},
        "mutants": {},
    }
    for mutant in asked["mutants"]:
        assert source.count(mutant["of"]) == 1, f"{mutant['of']!r} is not once in the reference"
        changed = build_reference(source.replace(mutant["of"], mutant["to"]))
        found["mutants"][mutant["name"]] = {
            case["name"]: max(compare(case, steps, changed)["differences"].values()) for case, steps in checked
        }
    out.write_text(json.dumps(found))


def make_model(folder: Path) -> None:
    """Make a random model of few words, so that a pass through it costs next to nothing."""
    import torch
    from fixed_rollouts import END
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<end>", *(f"w{index}" for index in range(2, 128))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)


def build_reference(source: str) -> ModuleType:
    module = ModuleType("reference")
    exec(compile(source, str(REFERENCE), "exec"), module.__dict__)
    return module


# --- The trainer ------------------------------------------------------------------------------------------------------


def measure(case: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """Return the micro-batches of each step of a run."""
    from fixed_rollouts import STEPS, Measured

    from posttrain.contract.config import TrainingConfig
    from posttrain_workloads import grpo
    from posttrain_workloads.rank import Rank
    from posttrain_workloads.runtime import Runtime

    storage = Path(case["storage"])
    storage.mkdir(parents=True)
    rank = Rank(
        config=TrainingConfig.from_json(json.dumps(case["config"])),
        environ={**os.environ, "POSTTRAIN_STORAGE": case["storage"], "POSTTRAIN_MOUNT_FILES": "/"},
        storage=storage,
        runtime=Runtime(storage),
        rank=0,
        local_rank=0,
        reporter=None,
    )
    try:
        grpo.train(rank)
    except Measured as end:
        [batches] = end.args
        return [[batch for batch in batches if batch["step"] == step] for step in range(STEPS)]
    raise AssertionError("the run did not end itself")


# --- The reference ----------------------------------------------------------------------------------------------------


class Truth:
    """Log-probabilities of the tokens in float64, each sequence by itself, by the weights at each step."""

    def __init__(self, folder: Path, prompts: Sequence[str]) -> None:
        import copy

        import torch
        from fixed_rollouts import STEPS, add_noise
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.prompts = AutoTokenizer.from_pretrained(folder)(list(prompts))["input_ids"]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.logits = [self._read(copy.deepcopy(model).double())]
        for step in range(STEPS):
            add_noise(model, seed=step + 1)
            self.logits.append(self._read(copy.deepcopy(model).double()))

    def _read(self, model: Any) -> list[Any]:
        """Return the logits before each token of each completion."""
        import torch
        from fixed_rollouts import COMPLETIONS

        found = []
        for index, completion in enumerate(COMPLETIONS):
            prompt = self.prompts[index * len(self.prompts) // len(COMPLETIONS)]
            with torch.no_grad():
                found.append(model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1])
        return found

    def log_probabilities(self, weights: int, completions: list[int], *, temperature: float) -> Any:
        """Return (B, T) log-probabilities, after the end anything."""
        from fixed_rollouts import COMPLETIONS

        found = np.random.default_rng(weights).standard_normal((len(completions), max(map(len, COMPLETIONS))))
        for row, index in enumerate(completions):
            scaled = self.logits[weights][index].numpy() / temperature
            normal = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
            ids = COMPLETIONS[index]
            found[row, : len(ids)] = normal[range(len(ids)), ids]
        return found

    def inputs_of(self, case: Mapping[str, Any], batches: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what the reference takes of one step, and what the trainer made of it."""
        from fixed_rollouts import COMPLETIONS, END, SCORES

        args = case["config"]["args"]
        completions = [index for batch in batches for index in batch["completions"]]
        [weights], [sampled_by] = ({batch[key] for batch in batches} for key in ("weights", "sampled_by"))

        def read(weights: int) -> Any:
            return self.log_probabilities(weights, completions, temperature=args.get("temperature", 1.0))

        def mask_of(index: int) -> list[float]:
            ids = COMPLETIONS[index]
            counts = not args.get("mask_truncated_completions") or ids[-1] == END
            return [float(counts and place < len(ids)) for place in range(max(map(len, COMPLETIONS)))]

        share = args["gradient_accumulation_steps"] / args["steps_per_generation"]
        slopes = np.zeros((len(completions), max(map(len, COMPLETIONS))))
        rows = [row for batch in batches for row in batch["slopes"]]
        for row, values in enumerate(rows):
            slopes[row, : len(values)] = values
        return {
            "rewards": np.array([SCORES[which] for which in case["rewards"]], dtype=float).T,
            "completions": completions,
            "loss_inputs": {
                "held": read(weights),
                "old": read(sampled_by),
                "reference": read(0),
                "mask": np.array([mask_of(index) for index in completions]),
                "micro_batches": len(batches),
                "tokens": share * sum(sum(mask_of(index)) for index in range(len(COMPLETIONS))),
            },
            "trained": {
                "advantages": [value for batch in batches for value in batch["advantages"]],
                "loss": sum(batch["loss"] for batch in batches),
                "slopes": slopes,
                "dtypes": {batch["dtype"] for batch in batches},
            },
        }


def compare(case: Mapping[str, Any], steps: list[dict[str, Any]], reference: ModuleType) -> dict[str, Any]:
    """Return the largest differences between trainer and reference, and which tokens the bounds strike at."""
    settings = case["config"]["args"]
    differences = {"advantages": 0.0, "loss": 0.0, "slopes": 0.0}
    told: dict[str, Any] = {"differences": differences, "clipped": [0, 0], "dtypes": []}

    def see(key: str, distance: Any) -> None:
        differences[key] = max(differences[key], float(np.nan_to_num(np.abs(distance), nan=np.inf).max()))

    for step in steps:
        trained, inputs = step["trained"], step["loss_inputs"]
        every = reference.find_advantages(
            step["rewards"], np.array(case["weights"]), group=settings["num_generations"], settings=settings
        )
        advantages = every[step["completions"]]
        see("advantages", advantages - trained["advantages"])

        def find_loss(policy: Any) -> float:
            return reference.find_loss(policy, advantages=advantages, settings=settings, **inputs)  # noqa: B023

        see("loss", find_loss(inputs["held"]) - trained["loss"])
        draw = np.random.default_rng(0)
        for _ in range(SLOPES):
            direction = draw.standard_normal(inputs["held"].shape) * inputs["mask"]
            ahead, behind = (find_loss(inputs["held"] + sign * 1e-5 * direction) for sign in (1, -1))
            see("slopes", (ahead - behind) / 2e-5 - (trained["slopes"] * direction).sum())
        inside = {**reference.DEFAULTS, **settings}
        ratio = reference.find_ratio(
            inputs["held"] - inputs["old"], inputs["mask"], level=inside["importance_sampling_level"]
        )
        below = (ratio < 1 - inside["epsilon"]) & (advantages < 0)[:, None] & (inputs["mask"] > 0)
        above = (ratio > 1 + inside["epsilon_high"]) & (advantages > 0)[:, None] & (inputs["mask"] > 0)
        told["clipped"] = [count + int(now.sum()) for count, now in zip(told["clipped"], (below, above), strict=True)]
        told["dtypes"] += trained["dtypes"]
    return told


if __name__ == "__main__":
    main()
