"""Rollout servers as a run sees them: whether they answer, in words.

It owns the condition ServerReady; it must not know how a server is written.
"""

from __future__ import annotations

from posttrain.api.servers import RolloutServers
from posttrain.plan.manifests import is_out_of_sight, node_name, silent_from
from posttrain.plan.names import server_name
from posttrain.plan.pods import find_end, find_obstacle, find_refusal, how_to_release
from posttrain.plan.rollout_servers import RESTARTS_MAX, count_ready, restarts_of, servers_ref
from posttrain.plan.situation import Situation
from posttrain.plan.status import Says
from posttrain.plan.trainer_pod import SERVER_CONTAINER


def explain_servers(situation: Situation) -> Says:
    """Return whether every server answers, and if not, why not: the first obstacle found, else how many do."""
    servers = situation.run.spec.rollout_servers
    if servers is None:
        return Says("Unknown", "NoServers")
    if not situation.holds_servers and situation.awaits_quota:
        return Says("False", "ServersWanted")
    if situation.servers_ready:
        return Says("True", "ServersReady")
    refused = situation.observed.rejected.get(servers_ref(situation.name))
    if refused is not None:
        return Says("False", "ChildRejected", refused)
    pods = situation.server_pods
    ended = find_end(pods, container=SERVER_CONTAINER, asked=False)
    if ended is not None:
        return Says("False", "CrashLooping", ended)
    obstacle = _explain_silence(situation) or _find_obstacle(situation, servers)
    if obstacle is not None:
        return obstacle
    ended = find_end(pods, container=SERVER_CONTAINER)
    if ended is not None:
        return Says("False", "CrashLooping", ended)
    return Says("False", "Loading", f"{count_ready(situation.run, pods)} of {servers.replicas} servers answer")


def _explain_silence(situation: Situation) -> Says | None:
    """Return that the node of a server does not answer: its pod comes back under its name when it is surely gone."""
    for pod in situation.server_pods:
        name, deleted = pod["metadata"]["name"], silent_from(pod)
        if deleted is not None and deleted <= situation.now:
            told = f"pod {name} was deleted, and node {node_name(pod)} does not say that it has ended"
            return Says("Unknown", "NodeUnreachable", f"{told}: no other one bears its name. {how_to_release(pod)}")
        if is_out_of_sight(pod):
            told = f"node {node_name(pod)} does not answer: whether {name} still serves is not known"
            return Says("Unknown", "NodeUnreachable", told)
    return None


def _find_obstacle(situation: Situation, servers: RolloutServers) -> Says | None:
    pods = situation.server_pods
    refused = find_refusal(
        situation.observed.creation_events,
        of=server_name(situation.name),
        missing=servers.pods - len(pods),
        size=servers.pods,
    )
    return refused or find_obstacle(pods, events=situation.observed.pod_events)


def never_answers(situation: Situation) -> str | None:
    """Return how a server ended that has been restarted often enough to know that it will not answer.

    When the gang before was made all of them answered: restarts up to its end do not count. A node of a server that
    only waits for the others ends with nobody's fault, as long as something keeps one of them from starting, or takes
    it out of sight.
    """
    servers = situation.run.spec.rollout_servers
    if servers is None:
        return None
    before = situation.status.server_restarts or {}
    given_up = [
        pod for pod in situation.server_pods if restarts_of(pod) - before.get(pod["metadata"]["uid"], 0) >= RESTARTS_MAX
    ]
    waits = _explain_silence(situation) or _find_obstacle(situation, servers)
    ended = find_end(given_up, container=SERVER_CONTAINER, asked=waits is None)
    return f"after {RESTARTS_MAX} restarts {ended}" if ended is not None else None
