"""The catalogue of reasons: every word that a condition, a failure or an exit gives as its cause.

It owns the words, what they mean and what a person can do; it must not decide which of them applies.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Reason:
    """A reason: its CamelCase name, what it says, and what to do about it."""

    name: str
    message: str
    advice: str = ""

    @property
    def anchor(self) -> str:
        """Anchor of the reason in docs/reasons.md."""
        return self.name.lower()


_CATALOGUE = (
    # On the way
    Reason(name="Pending", message="Nothing has been looked at yet."),
    Reason(name="InProgress", message="The run is on its way."),
    Reason(name="Accepted", message="The spec is valid and its references resolve."),
    Reason(name="Preparing", message="Inputs are being checked and fetched."),
    Reason(name="Prepared", message="Checks passed, inputs fetched."),
    Reason(name="PrepareDisabled", message="spec.prepare.enabled is false: nothing was checked beforehand."),
    Reason(name="DryRun", message="spec.prepare.dryRun is true: the run ended after its checks."),
    Reason(name="PodsStarting", message="The gang's pods are starting."),
    Reason(name="AllPodsRunning", message="Every pod of the gang runs."),
    Reason(
        name="NodeUnreachable",
        message="The node of a pod does not answer.",
        advice="Nothing at first: the gang goes on if the node comes back. The cluster gives its pods up after five "
        "minutes (a toleration of node.kubernetes.io/unreachable in spec.podOverrides sets another time), and the "
        "run restarts elsewhere. A rollout server's pod bears its name for as long as it is listed: it comes back when "
        "the node does, or when somebody who knows that it is off deletes the Node object, or the pod with --force.",
    ),
    Reason(name="NoServers", message="The run has no servers beside its gang."),
    Reason(name="ServersWanted", message="The rollout servers are made once there is quota for them."),
    Reason(name="Loading", message="The rollout servers are loading the model."),
    Reason(name="ServersReady", message="Every rollout server answers."),
    Reason(
        name="CrashLooping",
        message="A rollout server ends again and again.",
        advice="The message has its last words. Mend what they name in spec.grpo.rollout.server: often it is memory, "
        "for which there are maxModelLength and args.gpu-memory-utilization.",
    ),
    Reason(name="Restarting", message="The gang is being restarted."),
    Reason(
        name="Suspended",
        message="spec.suspend is true.",
        advice="Set spec.suspend to false to go on from the latest checkpoint.",
    ),
    Reason(name="Completed", message="The run is complete."),
    # The spec and what it refers to
    Reason(
        name="InvalidSpec",
        message="The spec is not valid.",
        advice="Delete the run, change the fields named in the message, and apply it again: most fields of a "
        "run cannot be edited. Where an attempt is under way, as after an upgrade, it goes on as it was made: wait for "
        "its end, and delete the run only then. No other attempt follows it.",
    ),
    Reason(
        name="SpecChanged",
        message="The spec is not the one this run was accepted with.",
        advice="Give the changed run another name, or delete this one first.",
    ),
    Reason(
        name="NetworkPolicyNotEnforced",
        message="Rollout servers take weights from everybody who reaches them, and nobody is kept from it here.",
        advice="Take spec.grpo.rollout.mode: Colocate; or have a network that enforces NetworkPolicies, or the risk "
        "accepted (openRolloutServers), in the platform's settings.",
    ),
    Reason(
        name="NameConflict",
        message="An object with a child's name exists and is not this run's.",
        advice="Rename the run, or delete the object that is named.",
    ),
    Reason(
        name="PredecessorEnding",
        message="Something of an earlier run of the same name is still there.",
        advice="Nothing at first: it goes by itself, and the run begins then. A pod on a node that is lost stays: the "
        "message says when it is for you to delete it.",
    ),
    Reason(
        name="ChildRejected",
        message="The API server refuses an object that the run needs, or fails at it again and again.",
        advice="Mend what the message names (a quota, a webhook's rule or one that does not answer, a right); it is "
        "tried again by itself.",
    ),
    Reason(
        name="ReferencePending",
        message="Something that the spec refers to does not exist yet.",
        advice="Create the object that is named; the run goes on by itself.",
    ),
    Reason(
        name="ReferenceFailed",
        message="A run that the spec refers to has nothing that can be used.",
        advice="Delete the run that is named, mend its cause and apply it again under its name; this one goes on then.",
    ),
    Reason(
        name="ModelNotFound",
        message="The model does not exist or cannot be read.",
        advice="Check spec.model.source and revision.",
    ),
    Reason(
        name="DatasetNotFound",
        message="A dataset does not exist or cannot be read.",
        advice="Check the source, config, split and revision that are named.",
    ),
    Reason(
        name="StorageHoldsAnotherRun",
        message="The storage holds the results of another spec under the same name.",
        advice="Give the run another name, or remove the folder that is named.",
    ),
    # Prepare
    Reason(
        name="PrepareFailed",
        message="Prepare found problems.",
        advice="Every problem is listed in the message with its fix.",
    ),
    Reason(
        name="DatasetColumnMissing",
        message="A column that is needed is not in the data.",
        advice="Rename a column with datasets[].rename, or choose other data.",
    ),
    Reason(
        name="DatasetColumnsDiffer",
        message="The members of the mixture have different columns.",
        advice="Select the common ones with datasets[].columns.",
    ),
    Reason(
        name="DatasetRowsInvalid",
        message="Some rows of the data cannot be trained on.",
        advice="Mend or remove the rows of which the message shows the first.",
    ),
    Reason(name="DatasetEmpty", message="No row is left to train on."),
    Reason(
        name="TokenizerMissing",
        message="The model has no tokenizer.",
        advice="Use a model folder that has tokenizer files.",
    ),
    Reason(
        name="ChatTemplateMissing",
        message="Messages need a chat template and the tokenizer has none.",
        advice="Set spec.model.chatTemplate.",
    ),
    Reason(
        name="UnsafeWeights",
        message="The model has only pickled weights.",
        advice="Convert them to safetensors; posttrain does not unpickle.",
    ),
    Reason(
        name="GatedModel",
        message="The model or dataset is gated.",
        advice="Ask for access on the Hub and set spec.access.hubTokenSecretRef.",
    ),
    Reason(
        name="HubAuthenticationFailed",
        message="The Hub refused the token.",
        advice="Renew the token in the Secret that spec.access.hubTokenSecretRef names.",
    ),
    Reason(
        name="HubUnreachable",
        message="The Hub did not answer.",
        advice="Check the network and spec.access.hubEndpoint, or use pvc:// sources.",
    ),
    Reason(
        name="PackageMissing",
        message="A package that spec.sft.args implies is not in the image.",
        advice="Use an image that has it (spec.podOverrides.image), or change the key that is named.",
    ),
    Reason(
        name="CodeImportFailed",
        message="Own code does not import.",
        advice="The last lines of the traceback are in the message.",
    ),
    Reason(
        name="BatchNotDivisible",
        message="The batch sizes do not fit together.",
        advice="Change the keys that are named.",
    ),
    Reason(
        name="EstimateExceedsMemory",
        message="The estimate exceeds the GPU's memory.",
        advice="Shorten max_length, lower per_device_train_batch_size, use gradient_checkpointing, ZeRO3, "
        "offload or LoRA. A rollout server takes fewer copies of the model, or more GPUs.",
    ),
    Reason(
        name="ConfigInvalid",
        message="The trainer refuses its configuration.",
        advice="Change the key that is named in the message.",
    ),
    # Quota
    Reason(name="NoQueue", message="spec.resources.queueName is not set: the gang needs no quota."),
    Reason(name="QuotaReserved", message="The queue has admitted the run."),
    Reason(
        name="QuotaPending",
        message="The run waits in its queue.",
        advice="Wait, ask for less in spec.resources, or raise spec.resources.workloadPriorityClass.",
    ),
    Reason(
        name="Preempted",
        message="The queue gave the run's quota to another one.",
        advice="Nothing: the run goes on from its latest checkpoint when it is admitted again.",
    ),
    Reason(
        name="QuotaLost",
        message="The queue has taken the run's quota back.",
        advice="The message names Kueue's reason; the run goes on from its latest checkpoint when it is admitted "
        "again.",
    ),
    Reason(
        name="QueueUnavailable",
        message="The queue cannot admit any run.",
        advice="Check spec.resources.queueName, and that the LocalQueue and its ClusterQueue exist and are not "
        "stopped.",
    ),
    Reason(
        name="WorkloadDeactivated",
        message="Kueue has deactivated the run's Workload.",
        advice="Mend what the message names, then set spec.suspend to true and back to false: quota is asked for anew.",
    ),
    Reason(
        name="KueueMissing",
        message="spec.resources.queueName is set, and Kueue is not installed in this cluster.",
        advice="Install Kueue, or apply the run without spec.resources.queueName.",
    ),
    Reason(
        name="FlavorMissing",
        message="A ResourceFlavor that the quota was reserved in does not exist.",
        advice="Create the ResourceFlavor that is named; the run goes on by itself.",
    ),
    Reason(
        name="TopologyUnsupported",
        message="The queue places pods by topology, which posttrain does not support.",
        advice="Use a queue whose ResourceFlavors have no topologyName.",
    ),
    # The sandbox
    Reason(
        name="SandboxStarting",
        message="The sandbox for programs out of completions is starting.",
    ),
    Reason(
        name="SandboxFailed",
        message="The sandbox ends instead of serving.",
        advice="Its last words are in the message: where a wall does not hold, its node's kernel, or the RuntimeClass "
        "or seccomp profile around it, is too old. Choose other nodes in the operator's settings (sandbox), or servers "
        "of your own in spec.grpo.sandbox. One that ends while the run trains is started again, and the run goes on.",
    ),
    Reason(
        name="SandboxUnreachable",
        message="What runs programs for spec.grpo.sandbox does not answer as it should.",
        advice="Check the addresses of Piston servers, or the key and template of E2B or Morph; that languages are "
        "installed there; and that no network policy keeps the run's pods from it.",
    ),
    # Waiting
    Reason(
        name="Unschedulable",
        message="No node has room for a pod.",
        advice="Wait, or ask for less in spec.resources.",
    ),
    Reason(
        name="ImagePullFailed",
        message="An image cannot be pulled.",
        advice="Check the image's name and spec.podOverrides.imagePullSecrets.",
    ),
    Reason(
        name="ContainerNotStarted",
        message="A container cannot be created or started.",
        advice="Mend what the message names, often a Secret or ConfigMap that is missing or lacks a key; the kubelet "
        "tries again by itself.",
    ),
    Reason(
        name="VolumePending",
        message="A volume is not bound or cannot be mounted.",
        advice="Check the claim and its storage class, and what else the message names.",
    ),
    Reason(
        name="QuotaExceeded",
        message="A ResourceQuota of the namespace refuses a pod.",
        advice="Wait until other pods have ended, have the quota raised, or ask for less in spec.resources.",
    ),
    Reason(
        name="PodsNotCreated",
        message="A pod cannot be created.",
        advice="The API server's refusal is in the message: it names the policy or the field.",
    ),
    # Ends
    Reason(
        name="DeadlineExceeded",
        message="The run took longer than spec.activeDeadlineSeconds.",
        advice="Raise it: the field may be changed while the run lives.",
    ),
    Reason(
        name="PendingDeadlineExceeded",
        message="Prepare waited longer than spec.pendingDeadlineSeconds for its pod, or the gang for its quota, its "
        "sandbox and rollout servers, and its pods.",
        advice="Mend what the message names, ask for less, or raise the deadline.",
    ),
    Reason(
        name="RestartBudgetSpent",
        message="The restart budget is spent.",
        advice="Mend the cause that is named, or raise the budget in spec.restarts.",
    ),
    Reason(
        name="ProgressStalled",
        message="Nothing was heard of the gang for spec.restarts.progressDeadlineSeconds.",
        advice="Look at the logs of the rank that reported last; raise the deadline if a phase really takes that long.",
    ),
    Reason(
        name="RewardFunctionFailed",
        message="No reward could score any completion of a step, or an own reward fails on the data.",
        advice="Mend the reward that the message names, or the column that it reads: nothing is learnt from "
        "completions without a reward.",
    ),
    Reason(
        name="RolloutFunctionFailed",
        message="The run's own rollout function fails, or returns what cannot be trained on.",
        advice="Mend the function in spec.grpo.rolloutFunction as the message says; docs/rollouts.md says what it has "
        "to return.",
    ),
    # What a grpo run learns from
    Reason(name="SignalHealthy", message="No check finds anything in what the run learns from."),
    Reason(
        name="RewardSignalDead",
        message="Nearly every group of completions is rewarded alike: there is nothing to learn from.",
        advice="See what is rewarded (`posttrain samples`, report.html). Where all fail, take easier prompts, a reward "
        "with partial credit, or more num_generations; where all are right, harder prompts.",
    ),
    Reason(
        name="EntropyCollapsed",
        message="The model is nearly certain of each token: it does not try anything any more.",
        advice="Go back to an earlier checkpoint with a lower learning_rate, a higher epsilon_high or temperature, or "
        "an entropy_coef.",
    ),
    Reason(
        name="KlTooLarge",
        message="The model has moved further away from the reference model than its bound.",
        advice="Lower learning_rate, or raise beta.",
    ),
    Reason(
        name="CompletionsClipped",
        message="Nearly all completions are cut off at max_completion_length.",
        advice="Raise max_completion_length, or reward shorter completions (soft_overlong_punishment).",
    ),
    Reason(
        name="StaleRolloutWeights",
        message="vLLM generated with other weights than those that are trained.",
        advice="At the first step vLLM computes otherwise than the trainer does: set spec.model.dtype, or take "
        "spec.grpo.rollout.mode: Transformers. At a later one weights were lost on the way: the log says more.",
    ),
    Reason(
        name="RolloutFailed",
        message="A rollout server refused what the trainer asked of it.",
        advice="The message has the server's words. An option in spec.grpo.rollout.server.args may be the cause.",
    ),
    Reason(
        name="ServerLost",
        message="The rollout servers do not answer any more.",
        advice="The gang restarts on its infrastructure budget, and a server by itself. If it happens again, the end "
        "of the server's log says why: often memory, for which there are gpu-memory-utilization and maxModelLength.",
    ),
    Reason(
        name="NonFiniteLoss",
        message="A loss or gradient norm was not finite.",
        advice="Lower the learning rate, raise warm-up, check the data at the step that is named.",
    ),
    Reason(
        name="CudaOutOfMemory",
        message="A GPU ran out of memory.",
        advice="Lower per_device_train_batch_size or max_length, use gradient_checkpointing, ZeRO3, offload or LoRA.",
    ),
    Reason(
        name="HostOutOfMemory",
        message="A container ran out of memory.",
        advice="Raise spec.resources.memory, lower dataloader_num_workers, or keep less on the CPU "
        "(parallelism.offload).",
    ),
    Reason(
        name="NcclTimeout",
        message="A collective operation timed out.",
        advice="Another rank failed or hangs: see the first error; else check the network between the nodes.",
    ),
    Reason(
        name="RankKilled",
        message="A rank was killed from outside.",
        advice="Usually the node's or the administrator's doing; the run restarts on its infrastructure budget.",
    ),
    Reason(
        name="PeerLost",
        message="A rank lost its connection to another one.",
        advice="The other rank's end is the cause: see the pod that failed first.",
    ),
    Reason(
        name="RankCrashed",
        message="A rank ended by a signal of its own.",
        advice="A crash in native code: see the log of the rank.",
    ),
    Reason(name="Terminated", message="The pod was told to stop."),
    Reason(
        name="WorldSizeMismatch",
        message="The number of ranks that met is not the number planned.",
        advice="The pods' PET_* variables are missing or changed: look for what edits the pods.",
    ),
    Reason(name="StrategyMismatch", message="The ranks run another parallelism than planned."),
    Reason(
        name="CheckpointCorrupt",
        message="No checkpoint passed its verification.",
        advice="Start anew under another name, or restore the storage.",
    ),
    Reason(
        name="CheckpointUnusable",
        message="The newest checkpoint cannot be resumed with this gang.",
        advice="Use the number of ranks that the checkpoint was written with.",
    ),
    Reason(
        name="DiskFull",
        message="The storage is full.",
        advice="Enlarge the claim, or keep fewer checkpoints (checkpoints.keepLast).",
    ),
    Reason(name="PodDeleted", message="A pod of the gang was deleted or replaced."),
    Reason(name="NodeLost", message="The node of a pod is gone."),
    Reason(name="Evicted", message="A pod was evicted."),
    Reason(name="JobDeleted", message="The attempt's job was deleted by somebody else."),
    Reason(
        name="TrainingFailed",
        message="The training program failed.",
        advice="The error is in the message; the whole traceback is in the log of the rank.",
    ),
)

REASONS: dict[str, Reason] = {reason.name: reason for reason in _CATALOGUE}

CONSEQUENCES = frozenset({"Terminated", "PeerLost"})
"""Ends that follow from another's: never the cause, however early they are."""


def advice_for(name: str) -> str:
    """Return what a person can do about the reason; empty for an unknown one."""
    reason = REASONS.get(name)
    return reason.advice if reason else ""
