"""What a run tells those that refer to it.

It owns how another run's state is read; it must not decide what that means for who refers to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from posttrain.api.training_run import TrainingRun
from posttrain.contract.checkpoints import MODEL_FOLDER, storage_uri
from posttrain.plan.types import Manifest


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Another run, as far as it matters to who starts from its model."""

    name: str
    stage: str
    finished: bool
    message: str
    """What its condition Succeeded says."""
    model_uri: str | None
    """Where the model lies; None while there is none, and for good where the run failed."""
    trains_adapter: bool

    @property
    def failure(self) -> str | None:
        """Why nothing can ever start from its model, and what to do; None while that is not so."""
        if self.trains_adapter:
            return (
                f"run {self.name} trains an adapter, and a run starts from whole weights: merge the adapter into its "
                "model, and name the merged one in spec.model.source"
            )
        if self.finished and self.model_uri is None:
            return f"run {self.name} has ended without a model ({self.message}): run it anew under that name"
        return None


def has_ended(manifest: Manifest) -> bool:
    """Return whether a run as it is stored has ended, well or not."""
    return (manifest.get("status") or {}).get("completionTime") is not None


def parse_run_state(manifest: Manifest) -> RunState:
    """Return the state of a run as it is stored, also one that today's schema would not accept."""
    status, spec = manifest.get("status") or {}, manifest.get("spec") or {}
    conditions = {condition.get("type"): condition for condition in status.get("conditions") or ()}
    succeeded = conditions.get("Succeeded") or {}
    done = succeeded.get("status") == "True"
    return RunState(
        name=manifest["metadata"]["name"],
        stage=str(status.get("stage") or "Pending"),
        finished=has_ended(manifest),
        message=f"{succeeded.get('reason')}: {succeeded.get('message')}",
        model_uri=(status.get("model") or {}).get("uri") if done else None,
        trains_adapter=spec.get("peft") is not None,
    )


def foresee_end(name: str, *, beside: Iterable[TrainingRun]) -> Manifest:
    """Return a run as it will be stored when it has ended well; of one that is not `beside` only the name is known."""
    known = next((run for run in beside if run.metadata.name == name), None)
    claim = known.spec.checkpoints.storage.claim_name if known is not None else None
    return {
        "metadata": {"name": name},
        "status": {
            "stage": "Succeeded",
            "conditions": [{"type": "Succeeded", "status": "True"}],
            "model": {"uri": storage_uri(name, path=MODEL_FOLDER, claim_name=claim)},
        },
    }
