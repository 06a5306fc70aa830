"""The checks whether a run can be carried out as it is written: its spec, its children's names, its references.

It owns why a run waits or is refused before anything of it runs; it must not know how a refusal is told.
"""

from __future__ import annotations

from posttrain.api.reasons import REASONS
from posttrain.plan.children import child_refs
from posttrain.plan.objects import code_hash
from posttrain.plan.predecessors import explain_predecessors
from posttrain.plan.situation import Situation
from posttrain.plan.status import Says, Verdict
from posttrain.plan.verdicts import refuse


def explain_obstacle(situation: Situation) -> Says | None:
    """Return what keeps children from being made as they are wanted, whatever the run does."""
    return (
        _explain_problems(situation)
        or explain_predecessors(situation)
        or _explain_change(situation)
        or _explain_conflict(situation)
        or _explain_refusal(situation)
        or _explain_lost_code(situation)
    )


def _explain_problems(situation: Situation) -> Says | None:
    """The spec asks for something that cannot be, or that this operator, other than an earlier one, does not take."""
    if not situation.problems:
        return None
    return Says("False", "InvalidSpec", "\n".join(str(problem) for problem in situation.problems))


def _explain_change(situation: Situation) -> Says | None:
    """The spec is not the accepted one (what the API server cannot see, inside `args`), or the code is not."""
    accepted = situation.provenance
    if accepted.config_hash is not None and accepted.config_hash != situation.config_hash:
        return Says(
            "False",
            "SpecChanged",
            f"the spec now has the hash {situation.config_hash}, and the run was accepted with {accepted.config_hash}: "
            "change it back, or give the changed run another name",
        )
    files = situation.code
    if files is not None and accepted.code_hash is not None and accepted.code_hash != code_hash(files):
        return Says(
            "False",
            "SpecChanged",
            f"the code's snapshot is gone, and what is there now has the hash {code_hash(files)} instead of "
            f"{accepted.code_hash}: restore it, or give the run another name",
        )
    return None


def _explain_conflict(situation: Situation) -> Says | None:
    """An object that is not the run's bears a child's name: it is never adopted."""
    taken = sorted(child_refs(situation) & situation.observed.foreign)
    if not taken:
        return None
    named = ", ".join(f"{ref.kind} {ref.name}" for ref in taken)
    return Says(
        "False", "NameConflict", f"{named} exists and does not belong to this run: delete it, or rename the run"
    )


def _explain_refusal(situation: Situation) -> Says | None:
    """The API server, a webhook or a quota refuses an object that the run needs, or does not show it."""
    rejected, unread = situation.observed.rejected, situation.observed.unread
    told = [f"{ref.kind} {ref.name} was refused: {rejected[ref]}" for ref in sorted(rejected)]
    told += [f"{ref.kind} {ref.name} cannot be read: {unread[ref]}" for ref in sorted(unread)]
    return Says("False", "ChildRejected", "\n".join(told)) if told else None


def _explain_lost_code(situation: Situation) -> Says | None:
    """The snapshot that an attempt began with is gone, and so is what it was made from."""
    missing = code_missing(situation) if situation.attempt else None
    return missing.accepted if missing is not None else None


def code_missing(situation: Situation) -> Verdict | None:
    """The run's own code is not there yet."""
    code = situation.run.spec.code
    if code is None or situation.code is not None:
        return None
    message = f"waiting for the code: there is no ConfigMap {code.config_map_name}"
    if code.path is not None:
        message = f"waiting for the code: there is no folder {code.path}"
    return _awaiting(message)


def model_missing(situation: Situation) -> Verdict | None:
    """The model is what another run ends with, and that one has not ended well yet."""
    reference = situation.run.spec.model.run_ref
    if reference is None or situation.provenance.model_source is not None:
        return None
    made = situation.referenced_run
    if made is None:
        return _awaiting(f"waiting for the model of run {reference.name}: there is no such run")
    if made.failure is not None:
        return refuse(situation, "ReferenceFailed", made.failure)
    if not made.finished:
        return _awaiting(f"waiting for the model of run {reference.name}, which is {made.stage}")
    return None


def _awaiting(message: str) -> Verdict:
    return Verdict(
        stage="Pending",
        accepted=Says("False", "ReferencePending", message),
        succeeded=Says("False", "InProgress", message),
    )


def servers_unprotected(situation: Situation) -> Verdict | None:
    """Its rollout servers would take weights from everybody: nothing is begun."""
    settings = situation.settings
    if situation.attempt or situation.run.spec.rollout_servers is None:
        return None
    if settings.enforces_network_policies or settings.open_rollout_servers:
        return None
    return refuse(situation, "NetworkPolicyNotEnforced", REASONS["NetworkPolicyNotEnforced"].message)
