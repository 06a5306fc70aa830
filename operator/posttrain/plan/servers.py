"""Rollout servers as a run sees them: whether they answer, in words, and what is wanted of them at this moment.

It owns the condition ServerReady; it must not know how a server is written.
"""

from __future__ import annotations

from posttrain.plan.children import server_children, server_refs
from posttrain.plan.pods import find_obstacle
from posttrain.plan.rollout_servers import RESTARTS_MAX, count_ready, is_ready, last_words, restarts_of
from posttrain.plan.situation import Situation
from posttrain.plan.status import Says
from posttrain.plan.types import Manifest, ObjectRef


def explain_servers(situation: Situation) -> Says:
    """Return whether every server answers, and if not, why not: the first obstacle found, else how many do."""
    servers = situation.run.spec.rollout_servers
    if servers is None:
        return Says("Unknown", "NoServers")
    if not situation.holds_servers and not situation.has_quota:
        return Says("False", "ServersWanted")
    if situation.servers_ready:
        return Says("True", "ServersReady")
    for pod in situation.server_pods:
        obstacle = find_obstacle(pod)
        if obstacle is not None:
            return obstacle
    for pod in situation.server_pods:
        if not is_ready(pod) and restarts_of(pod):
            message = f"pod {pod['metadata']['name']} was restarted {restarts_of(pod)} times: {last_words(pod)}"
            return Says("False", "CrashLooping", message)
    return Says("False", "Loading", f"{count_ready(situation.server_pods)} of {servers.replicas} servers answer")


def never_answers(situation: Situation) -> Says | None:
    """Return what a server says that has been restarted often enough to know that it will not answer."""
    if any(restarts_of(pod) >= RESTARTS_MAX and not is_ready(pod) for pod in situation.server_pods):
        return explain_servers(situation)
    return None


def wanted_servers(situation: Situation) -> tuple[Manifest, ...]:
    """Return the servers of a run whose gang may be there, or is about to."""
    return server_children(situation) if situation.has_quota else ()


def unwanted_servers(situation: Situation) -> tuple[ObjectRef, ...]:
    """Return the servers for deletion, where the quota that they had is gone."""
    return () if situation.has_quota else server_refs(situation)
