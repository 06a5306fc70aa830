"""Whether vLLM has a model's weights: the likeliest tokens after a few prompts, by transformers and by vLLM."""

from __future__ import annotations

from typing import Any

PROMPTS = [[5, 6, 7, 8], [100, 200, 300], [11, 12, 13, 14, 15], [400, 401], [900]]
TOKENS = 12
GREEDY = {"temperature": 0.0, "max_tokens": TOKENS, "generation_kwargs": {"ignore_eos": True}}


def greedy(model: Any) -> list[list[int]]:
    """Return the likeliest tokens after each prompt, by transformers."""
    import torch

    completions = []
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = list(prompt)
            for _ in range(TOKENS):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            completions.append(ids[len(prompt) :])
    return completions


def equal(client: Any, wanted: list[list[int]]) -> list[bool]:
    """Return of each server whether it answers with the wanted tokens."""
    return [server.generate(PROMPTS, **GREEDY)["completion_ids"] == wanted for server in client.servers]


def colocated(engine: Any) -> list[list[int]]:
    """Return the likeliest tokens after each prompt, by an engine in this process."""
    from vllm import SamplingParams

    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        sampling_params=SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True),
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]
