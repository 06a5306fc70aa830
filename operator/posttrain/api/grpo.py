"""The shape of GRPO: group relative policy optimization with TRL's GRPOTrainer, on rewards.

It owns what the fields under `spec.grpo` mean and which values they take; it must not know what a reward computes.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from posttrain.api.base import ApiModel, Decimal, Distinct, JsonObject, ShortText
from posttrain.api.inputs import EntryPoint, SecretKey
from posttrain.api.rules import Rule
from posttrain.api.servers import RolloutServers
from posttrain.api.signal import Signal


class Reward(ApiModel):
    """One reward: a function from a completion to a number."""

    name: ShortText | None = Field(
        default=None,
        description="A reward that posttrain has; docs/rewards.md lists them.",
        examples=["accuracy"],
    )
    function: EntryPoint | None = Field(
        default=None,
        description="`module:name` of a reward in `code`: a function of prompts, completions and the data's columns, "
        "which returns a number, or None where it cannot score, for each completion. It may be `async def`: such "
        "rewards are awaited together.",
        examples=["rewards:says_please"],
    )
    weight: Decimal = Field(
        default="1",
        description="What the reward is multiplied by before all are added up. Default: 1.",
        examples=["0.5"],
    )
    params: JsonObject = Field(
        default={},
        max_length=64,
        description="Parameters of the reward, by name. Default: none.",
        examples=[{"max_len": 2000}],
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="",
            message="exactly one of name (a reward that posttrain has) and function (one of your own) says what is "
            "rewarded",
            cel="has(self.name) != has(self.function)",
            holds=lambda reward: ("name" in reward) != ("function" in reward),
        ),
    )


PistonAddress = Annotated[
    str,
    StringConstraints(pattern=r"^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[A-Za-z0-9._~/-]*)?$", max_length=256),
]
"""The address of a server that speaks Piston's API, with or without `/api/v2` behind."""


_RENTED = frozenset({"E2B", "Morph"})


class Sandbox(ApiModel):
    """Where programs out of completions run, for the rewards that need it."""

    mode: Literal["Local", "Piston", "E2B", "Morph"] = Field(
        default="Local",
        description="Local: posttrain's own sandbox, a pod beside the trainer that goes when the run ends. Piston: "
        "servers of your own that speak Piston's API. E2B, Morph: machines that these services lend, one for each "
        "program that runs at the same time. Default: Local.",
        examples=["Local"],
    )
    endpoints: Annotated[tuple[PistonAddress, ...], Field(min_length=1, max_length=32), Distinct()] | None = Field(
        default=None,
        description="Addresses of the servers, which share the work; for Piston, and for nothing else.",
        examples=[["http://piston.tools.svc:2000"]],
    )
    api_key_secret_ref: SecretKey | None = Field(
        default=None,
        description="Secret with the key to E2B or Morph.",
        examples=[{"name": "e2b", "key": "api-key"}],
    )
    template: ShortText | None = Field(
        default=None,
        description="What a machine of E2B (a template) or of Morph (a snapshot, which has to be named) begins with: "
        "Linux with python3, and with g++ for C++. Default: E2B's own template for running code.",
        examples=["snapshot_7xk1a2b3"],
    )
    concurrency: int = Field(
        default=4,
        ge=1,
        le=256,
        description="How many programs run at the same time. The local sandbox gets a CPU for each, and one more; "
        "with Piston it is the number for each server, with E2B and Morph the number of machines. Default: 4.",
        examples=[4],
    )
    memory_mib: int = Field(
        default=1024,
        ge=64,
        le=65536,
        description="The most memory of one program, in MiB. The local sandbox gets so much for each that runs at the "
        "same time, and 1 GiB for itself. Default: 1024.",
        examples=[1024],
    )
    max_seconds: int = Field(
        default=60,
        ge=1,
        le=600,
        description="The longest time that the local sandbox gives a program, whatever its problem allows. "
        "Default: 60.",
        examples=[60],
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="endpoints",
            message="mode Piston needs the addresses of its servers in endpoints, and no other mode has any",
            cel="(self.mode == 'Piston') == has(self.endpoints)",
            holds=lambda sandbox: (sandbox["mode"] == "Piston") == ("endpoints" in sandbox),
        ),
        Rule(
            field="apiKeySecretRef",
            message="modes E2B and Morph need the Secret with their key in apiKeySecretRef, and no other mode has one",
            cel="(self.mode in ['E2B', 'Morph']) == has(self.apiKeySecretRef)",
            holds=lambda sandbox: (sandbox["mode"] in _RENTED) == ("apiKeySecretRef" in sandbox),
        ),
        Rule(
            field="template",
            message="mode Morph needs the snapshot that its machines begin with in template",
            cel="self.mode != 'Morph' || has(self.template)",
            holds=lambda sandbox: sandbox["mode"] != "Morph" or "template" in sandbox,
        ),
        Rule(
            field="template",
            message="template is for the machines of E2B and Morph: leave it out, or name one of them in mode",
            cel="self.mode in ['E2B', 'Morph'] || !has(self.template)",
            holds=lambda sandbox: sandbox["mode"] in _RENTED or "template" not in sandbox,
        ),
    )

    @property
    def is_rented(self) -> bool:
        """Whether the machines are those of a service, to which a key is needed."""
        return self.mode in _RENTED


class Rollout(ApiModel):
    """How completions are generated."""

    mode: Literal["Transformers", "Colocate", "Server"] = Field(
        default="Transformers",
        description="Transformers: the trainer's own model generates, by transformers. Colocate: vLLM generates, "
        "inside each rank and on its GPU, and gets the weights after each step; the `vllm_` keys of `args` set it up, "
        "and the image is `vllm`. Server: vLLM generates in servers of its own, which `server` describes. Default: "
        "Transformers.",
        examples=["Colocate"],
    )
    server: RolloutServers | None = Field(
        default=None,
        description="The servers of mode Server. They start before the gang, live over its restarts, and end with the "
        "run, its suspension and the loss of its quota, of which they have a part. Default: one server.",
        examples=[{"replicas": 2, "gpusPerNode": 4}],
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="server",
            message="server describes the servers of mode Server: write mode Server, or leave server out",
            cel="!has(self.server) || (has(self.mode) && self.mode == 'Server')",
            holds=lambda rollout: "server" not in rollout or rollout["mode"] == "Server",
        ),
    )


class Grpo(ApiModel):
    """Reinforcement learning on rewards, with TRL's GRPOTrainer."""

    args: JsonObject = Field(
        default={},
        max_length=256,
        description="Keys of TRL's GRPOConfig; an unknown key, a wrong type or a key that posttrain sets itself is "
        "refused. `posttrain explain spec.grpo.args` lists them. Plain `kubectl apply` loses a null: use "
        "`kubectl apply --server-side` for one.",
        examples=[{"learning_rate": 0.000001, "num_generations": 8, "max_completion_length": 1024}],
    )
    trainer_class: EntryPoint | None = Field(
        default=None,
        description="`module:Name` of a subclass of trl.GRPOTrainer in `code`.",
        examples=["trainers:MyGRPOTrainer"],
    )
    rollout_function: EntryPoint | None = Field(
        default=None,
        description="`module:name` in `code` of a function that makes the completions, in several turns or with what "
        "an environment answers: it is given the prompts of a rank and the trainer; or of a class of environments, "
        "whose methods the model calls as tools. docs/rollouts.md says more. Default: none, the model completes each "
        "prompt once.",
        examples=["turns:answer_twice"],
    )
    rewards: tuple[Reward, ...] = Field(
        min_length=1,
        max_length=32,
        description="What is rewarded: the weighted sum of all of them.",
        examples=[[{"name": "accuracy"}, {"name": "format", "weight": "0.5"}]],
    )
    sandbox: Sandbox | None = Field(
        default=None,
        description="Where programs out of completions run; only code, binary_code, ioi_code and cf_code run any. "
        "Default: posttrain's own sandbox.",
        examples=[{"concurrency": 8}],
    )
    rollout: Rollout = Field(
        default=Rollout(),
        description="How completions are generated. Default: by the trainer's own model.",
        examples=[{"mode": "Colocate"}],
    )
    signal: Signal = Field(
        default=Signal(),
        description="Checks of what the run learns from, and what follows where one finds something; may change while "
        "the run lives, bounds and steps from the next attempt on. Default: a warning.",
        examples=[{"deadReward": {"policy": "Suspend"}}],
    )
