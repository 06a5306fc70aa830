"""Rollout servers as a run sees them: whether they answer, in words.

It owns the condition ServerReady; it must not know how a server is written.
"""

from __future__ import annotations

from posttrain.plan.names import server_name
from posttrain.plan.pods import find_end, find_obstacle, find_refusal
from posttrain.plan.rollout_servers import RESTARTS_MAX, count_ready, restarts_of
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
    pods = situation.server_pods
    ended = find_end(pods, container=SERVER_CONTAINER)
    if ended is not None:
        return Says("False", "CrashLooping", ended)
    refused = find_refusal(
        situation.observed.creation_events,
        of=server_name(situation.name),
        missing=servers.pods - len(pods),
        size=servers.pods,
    )
    loading = f"{count_ready(pods, servers=servers)} of {servers.replicas} servers answer"
    obstacle = refused or find_obstacle(pods, events=situation.observed.pod_events)
    return obstacle or Says("False", "Loading", loading)


def never_answers(situation: Situation) -> str | None:
    """Return how a server ended that has been restarted often enough to know that it will not answer.

    When the gang before was made all of them answered: restarts up to its end do not count.
    """
    before = situation.status.server_restarts or {}
    given_up = (
        pod for pod in situation.server_pods if restarts_of(pod) - before.get(pod["metadata"]["uid"], 0) >= RESTARTS_MAX
    )
    ended = find_end(given_up, container=SERVER_CONTAINER)
    return f"after {RESTARTS_MAX} restarts {ended}" if ended is not None else None
