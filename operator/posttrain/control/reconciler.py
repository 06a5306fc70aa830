"""One look at one run: observe, plan, and make it so.

It owns the order of the writes and what an error of the API server means for a run; it must not decide anything, which
is the plan's. What is kept in memory, objects that stand in the way, is found again by the request that found it first.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, TypeVar

import orjson
import structlog
from pydantic import ValidationError

from posttrain.api.training_run import TrainingRun
from posttrain.api.validate import parse_training_run
from posttrain.control.authority import Authority, ForeignAuthority
from posttrain.control.cache import Cache, RunKey
from posttrain.control.drift import has_drifted
from posttrain.control.events import build_event
from posttrain.control.kinds import (
    CONFIG_MAP,
    DEPLOYMENT,
    JOB,
    POD,
    PYTORCHJOB,
    RESOURCE_FLAVOR,
    SECRET,
    STATEFUL_SET,
    TRAINING_RUN,
    WORKLOAD,
    WORKLOAD_PRIORITY_CLASS,
    Kind,
)
from posttrain.control.observe import Belongings, is_of_run, sort_belongings
from posttrain.control.obstacles import READ, Obstacles, Postponed, unless_it_fails
from posttrain.control.port import (
    MANAGER,
    AlreadyExists,
    Cluster,
    ClusterError,
    Conflict,
    NotFound,
    ObjectKey,
    Unavailable,
)
from posttrain.control.queues import QueueSetup
from posttrain.control.waiting import PATIENCE, needs_events, read_creation_events, read_pod_events
from posttrain.control.wakes import MADE_SECONDS
from posttrain.errors import InvalidResource, Problem
from posttrain.plan import labels, names
from posttrain.plan.kueue import parse_workload, workload_ref
from posttrain.plan.manifests import is_live
from posttrain.plan.references import has_ended
from posttrain.plan.training_run import plan_training_run
from posttrain.plan.types import Event, Manifest, ObjectRef, Observed, Plan, StatusPatch
from posttrain.plan.unreadable import status_of_unreadable
from posttrain.settings import Settings

T = TypeVar("T")

_ROUNDS = 5
"""How often a run is looked at anew at once because something had changed; then the queue's backoff counts."""
_OBSTACLE_SECONDS = 30.0
_REFERENCE_SECONDS = 15.0
_FLAVOR_SECONDS = 5.0
"""A run that waits for a flavor holds its quota all the while."""

_MAKES_PODS = frozenset({DEPLOYMENT, JOB, PYTORCHJOB, STATEFUL_SET})

log = structlog.get_logger(__name__)


class _Changed(Exception):
    """What was planned from is not so any more: look again."""


class Reconciler:
    """Makes the cluster what the plans of runs say."""

    def __init__(
        self,
        cluster: Cluster,
        cache: Cache,
        *,
        settings: Settings,
        authority: Authority,
        queues: QueueSetup,
        clock: Callable[[], datetime],
    ) -> None:
        self._cluster = cluster
        self._cache = cache
        self._settings = settings
        self._authority = authority
        self._queues = queues
        self._clock = clock
        self._obstacles: dict[RunKey, Obstacles] = {}

    async def reconcile(self, run_key: RunKey) -> float | None:
        """Make it so, and return after how many seconds to look again without any news.

        Raises:
            ClusterError: the API server did not take something; the same may succeed later.
        """
        for _ in range(_ROUNDS):
            try:
                return await self._look(run_key)
            except _Changed as change:
                log.debug("looking again", run="/".join(run_key), because=str(change))
            except Postponed as postponed:
                raise postponed.error from None
            except Unavailable:
                # What the server failed at before may have been the same.
                self._obstacles.pop(run_key, None)
                raise
        raise Conflict(f"{'/'.join(run_key)} changed {_ROUNDS} times while it was looked at")

    async def _look(self, run_key: RunKey) -> float | None:
        key = ObjectKey(*TRAINING_RUN, *run_key)
        manifest = self._cache.get(key)
        if manifest is None or manifest["metadata"].get("deletionTimestamp") is not None:
            # Deletion is the garbage collector's work: every child names its owner.
            self._obstacles.pop(run_key, None)
            return None
        belongings = sort_belongings(manifest, self._cache.children(run_key), departed=self._cache.departed(run_key))
        try:
            run = _parse(manifest)
        except InvalidResource as error:
            await self._refuse(manifest, error.problems, belongings)
            return None
        obstacles = self._known_obstacles(run_key)
        observed = await self._observe(run, belongings, obstacles)
        known = obstacles.refs
        plan = plan_training_run(run, observed, now=self._clock(), settings=self._settings)
        if plan.delete_run:
            await self._cluster.delete(key, uid=manifest["metadata"]["uid"])
            return None
        if plan.status_first:
            await self._record(manifest, plan)
        try:
            made = await self._carry_out(run, plan, belongings, obstacles)
        except Postponed:
            if obstacles.refs != known:
                raise _Changed("something stands in the way of a child") from None
            # The first status of all pins what the children hold, the code among it: it waits for them.
            if not plan.status_first and run.status.provenance is not None:
                await self._record(manifest, plan)
            raise
        if not plan.status_first:
            await self._record(manifest, plan)
        return _look_again(run, plan, belongings, obstacles, made=made)

    # --- Observing ---------------------------------------------------------------------------------------------------

    async def _observe(self, run: TrainingRun, belongings: Belongings, obstacles: Obstacles) -> Observed:
        needed, classes = _flavors_of(run, belongings), _priority_classes_of(run)
        config_maps = await self._own_code(run, belongings, obstacles)
        flavors = await self._queue_setup(RESOURCE_FLAVOR, needed, self._queues.flavors, run, obstacles)
        priorities = await self._queue_setup(WORKLOAD_PRIORITY_CLASS, classes, self._queues.priorities, run, obstacles)
        return Observed(
            objects=belongings.objects,
            pods=belongings.pods,
            departed=belongings.departed,
            foreign=belongings.foreign | obstacles.foreign,
            predecessors=belongings.predecessors,
            rejected=obstacles.rejected,
            unread=obstacles.unread,
            config_maps=config_maps,
            runs=self._referenced_runs(run),
            referrers=self._live_referrers(run),
            creation_events=await read_creation_events(self._cluster, run, belongings, now=self._clock()),
            pod_events=await read_pod_events(self._cluster, run, belongings, now=self._clock()),
            server_key=secrets.token_urlsafe(32),
            kueue=self._cache.is_served(WORKLOAD),
            flavors=flavors,
            priorities=priorities,
        )

    async def _queue_setup(
        self,
        kind: Kind,
        needed: tuple[str, ...],
        read: Callable[[tuple[str, ...]], Awaitable[dict[str, T]]],
        run: TrainingRun,
        obstacles: Obstacles,
    ) -> dict[str, T]:
        """Return what Kueue's administrators set up; a gang that was made can do without."""
        if not needed:
            return {}
        if run.status.attempt_created_time is not None:
            return await unless_it_fails(read(needed), what=f"{kind[1]} {needed[0]}") or {}
        return await self._read(lambda: read(needed), ObjectRef(*kind, needed[0]), run, obstacles) or {}

    async def _read(
        self, read: Callable[[], Awaitable[T]], about: ObjectRef, run: TrainingRun, obstacles: Obstacles
    ) -> T | None:
        """Return the answer to a request that a plan cannot do without; None where there is an obstacle."""
        if (READ, about) in obstacles.vain:
            return None
        return await obstacles.ask(READ, read(), about=about, run=run, now=self._clock())

    def _referenced_runs(self, run: TrainingRun) -> dict[str, Manifest]:
        reference = run.spec.model.run_ref
        if reference is None:
            return {}
        found = self._cache.get(ObjectKey(*TRAINING_RUN, run.metadata.namespace, reference.name))
        return {reference.name: found} if found is not None else {}

    def _live_referrers(self, run: TrainingRun) -> tuple[str, ...]:
        keys = self._cache.referrers((run.metadata.namespace, run.metadata.name))
        found = ((name, self._cache.get(ObjectKey(*TRAINING_RUN, namespace, name))) for namespace, name in keys)
        return tuple(name for name, other in found if other is not None and not has_ended(other))

    async def _own_code(
        self, run: TrainingRun, belongings: Belongings, obstacles: Obstacles
    ) -> dict[str, dict[str, str]]:
        """Return the data of the ConfigMap that the spec names, until the run has a snapshot of it."""
        code = run.spec.code
        if code is None or code.config_map_name is None or _code_ref(run) in belongings.objects:
            return {}
        key = ObjectKey(*CONFIG_MAP, run.metadata.namespace, code.config_map_name)
        try:
            found = await self._read(lambda: self._cluster.get(key), key.ref, run, obstacles)
        except NotFound:
            return {}
        return {key.name: dict(found.get("data") or {})} if found is not None else {}

    def _known_obstacles(self, run_key: RunKey) -> Obstacles:
        now, known = self._clock(), self._obstacles.get(run_key)
        if known is None or (now - known.since).total_seconds() >= _OBSTACLE_SECONDS:
            known = self._obstacles[run_key] = Obstacles(since=now)
        return known

    # --- Carrying out ------------------------------------------------------------------------------------------------

    async def _carry_out(self, run: TrainingRun, plan: Plan, belongings: Belongings, obstacles: Obstacles) -> bool:
        """Delete, create and repair what the plan says; return whether something was created."""
        known, made = obstacles.refs, False
        for ref in plan.deletes:
            if ("delete", ref) not in obstacles.vain:
                await self._delete(run, belongings.objects[ref], obstacles)
        for patch in plan.patches:
            if ("patch", patch.ref) not in obstacles.vain:
                await self._patch(run, patch, obstacles)
        if plan.objects:
            await self._bring_authority(run, obstacles)
        lacking = obstacles.refs != known
        for wanted in plan.objects:
            ref = ObjectRef.of(wanted)
            observed = belongings.objects.get(ref)
            if observed is not None:
                # One that cannot be mended is there all the same.
                if has_drifted(observed, wanted=wanted):
                    await self._repair(observed, wanted, run, obstacles)
            elif lacking and _kind_of(wanted) in _MAKES_PODS:
                # Its pods would run with another's configuration, or without what was refused.
                continue
            else:
                await self._create(wanted, run, obstacles)
                made = True
                lacking = lacking or ref in obstacles.refs
        if obstacles.refs != known:
            raise _Changed("something stands in the way of a child")
        return made

    async def _bring_authority(self, run: TrainingRun, obstacles: Obstacles) -> None:
        """See that the run's pods find the authority that they check the progress server against."""
        ref = ObjectRef(*CONFIG_MAP, self._settings.progress_server.ca_config_map)
        try:
            ensured = self._authority.ensure(run.metadata.namespace)
            await obstacles.ask("ensure", ensured, about=ref, run=run, now=self._clock())
        except ForeignAuthority as error:
            obstacles.rejected[ref] = str(error)

    async def _delete(self, run: TrainingRun, child: Manifest, obstacles: Obstacles) -> None:
        key = ObjectKey(child["apiVersion"], child["kind"], run.metadata.namespace, child["metadata"]["name"])
        try:
            deletion = self._cluster.delete(key, uid=child["metadata"]["uid"])
            await obstacles.ask("delete", deletion, about=key.ref, run=run, now=self._clock())
        except Conflict as error:
            await self._refresh(key)
            raise _Changed(str(error)) from error
        if ("delete", key.ref) not in obstacles.vain:
            log.info("deleted", run=_name(run), kind=key.kind, name=key.name)

    async def _patch(self, run: TrainingRun, patch: StatusPatch, obstacles: Obstacles) -> None:
        key = ObjectKey(patch.ref.api_version, patch.ref.kind, run.metadata.namespace, patch.ref.name)
        try:
            patching = self._cluster.patch(key, patch.payload, subresource=patch.subresource)
            patched = await obstacles.ask("patch", patching, about=key.ref, run=run, now=self._clock())
        except (Conflict, NotFound) as error:
            await self._refresh(key)
            raise _Changed(str(error)) from error
        if patched is None:
            return
        self._cache.put(patched, own=True)
        log.info("patched", run=_name(run), kind=key.kind, name=key.name)

    async def _create(self, wanted: Manifest, run: TrainingRun, obstacles: Obstacles) -> None:
        """Create a child. By POST, so that an object of its name that somebody made a moment ago is never touched."""
        ref = ObjectRef.of(wanted)
        # Nobody else's bears a Secret's name, and the operator may not look at one.
        unseen = _kind_of(wanted) == SECRET
        if _kind_of(wanted) == PYTORCHJOB:
            required = self._require_no_gang(run)
            if not await obstacles.ask("list", required, about=ref, run=run, now=self._clock()):
                return
        try:
            creation = self._cluster.create(wanted)
            made = await obstacles.ask("create", creation, about=ref, run=run, now=self._clock())
        except AlreadyExists:
            if not unseen:
                await self._find(wanted, run, obstacles)
        except NotFound as error:
            # What it belongs to, its kind among it, is not there.
            obstacles.rejected[ref] = str(error)
        else:
            if made is None:
                return
            if not unseen:
                self._cache.put(made, own=True)
            log.info("created", run=_name(run), kind=ref.kind, name=ref.name)

    async def _find(self, wanted: Manifest, run: TrainingRun, obstacles: Obstacles) -> None:
        """See whose the object of that name is. One of the run's that lost its label is not watched until it has it."""
        key = ObjectKey.of(wanted)
        try:
            there = await self._cluster.get(key)
        except NotFound:
            self._cache.forget(key)
        else:
            retains = run.spec.checkpoints.retain == "Always"
            if not is_of_run(there, uid=run.metadata.uid or "", name=run.metadata.name, retains=retains):
                obstacles.foreign.add(key.ref)
                return
            self._cache.put(there, own=True)
            if self._cache.get(key) is None:
                await self._repair(there, wanted, run, obstacles)
                return
        raise _Changed(f"{key.kind} {key.name} is there already")

    async def _require_no_gang(self, run: TrainingRun) -> bool:
        """See for certain that no pod of another gang lives: two gangs must never write to one storage.

        Nor one of the same attempt: its job may have been made by a request that got no answer, and deleted since.
        """
        found = await self._cluster.list(
            *POD,
            namespace=run.metadata.namespace,
            label_selector=f"{labels.RUN}={run.metadata.name},{labels.ROLE}={labels.ROLE_TRAINER}",
        )
        for pod in found.items:
            self._cache.put(pod, own=True)
        live = [pod["metadata"]["name"] for pod in found.items if is_live(pod, now=self._clock())]
        if live:
            raise _Changed(f"pods of another gang live: {', '.join(live)}")
        return True

    async def _repair(self, observed: Manifest, wanted: Manifest, run: TrainingRun, obstacles: Obstacles) -> None:
        key = ObjectKey.of(wanted)
        try:
            applying = self._cluster.apply(wanted, uid=observed["metadata"]["uid"])
            applied = await obstacles.ask("apply", applying, about=key.ref, run=run, now=self._clock())
        except (Conflict, NotFound) as error:
            await self._refresh(key)
            raise _Changed(str(error)) from error
        if applied is None:
            return
        self._cache.put(applied, own=True)
        log.info("repaired", run=_name(run), kind=key.kind, name=key.name)

    # --- The status --------------------------------------------------------------------------------------------------

    async def _record(self, manifest: Manifest, plan: Plan) -> None:
        assert plan.status is not None, "a plan of a TrainingRun has a status"
        status = plan.status.model_dump(mode="json", by_alias=True, exclude_none=True)
        await self._tell(await self._write_status(manifest, status), plan.events)

    async def _refuse(self, manifest: Manifest, problems: tuple[Problem, ...], belongings: Belongings) -> None:
        status = status_of_unreadable(manifest, problems, objects=belongings.objects, now=self._clock())
        if status is None:
            return
        told = status.model_dump(mode="json", by_alias=True, exclude_none=True)
        # What cannot be read today stays too: attempts and counters are facts, and nobody could tell them again.
        await self._write_status(manifest, {**(manifest.get("status") or {}), **told})

    async def _write_status(self, manifest: Manifest, status: dict[str, Any]) -> Manifest:
        """Write the operator's part of the status where it differs, and return the run as it then stands.

        The version that the plan was made from goes with it: whoever wrote in between, wins, and is planned with.
        """
        status.pop("progress", None)
        before = {name: value for name, value in (manifest.get("status") or {}).items() if name != "progress"}
        if status == before:
            return manifest
        metadata = manifest["metadata"]
        intent = {
            "apiVersion": manifest["apiVersion"],
            "kind": manifest["kind"],
            "metadata": {name: metadata[name] for name in ("name", "namespace", "uid", "resourceVersion")},
            "status": status,
        }
        key = ObjectKey.of(manifest)
        try:
            applied = await self._cluster.apply_status(intent, manager=MANAGER)
        except NotFound:
            self._cache.forget(key)
            raise _Changed("the run is gone") from None
        except Conflict as error:
            await self._refresh(key)
            raise _Changed(str(error)) from error
        self._cache.put(applied, own=True)
        return applied

    async def _refresh(self, key: ObjectKey) -> None:
        try:
            self._cache.put(await self._cluster.get(key), own=True)
        except NotFound:
            self._cache.forget(key)

    async def _tell(self, manifest: Manifest, events: tuple[Event, ...]) -> None:
        """Write the events; one that is lost costs a person a line, and never a run its way."""
        for event in events:
            try:
                await self._cluster.create(build_event(manifest, event, now=self._clock()))
            except AlreadyExists:
                continue
            except ClusterError as error:
                log.warning("an event was lost", run=manifest["metadata"]["name"], error=str(error))


def _parse(manifest: Manifest) -> TrainingRun:
    """Return the run in a stored object.

    Raises:
        InvalidResource: today's schema does not accept it; with every problem.
    """
    try:
        return TrainingRun.model_validate_json(orjson.dumps(manifest), by_alias=True, by_name=False)
    except ValidationError as error:
        # The same words that a person gets who validates the file.
        parse_training_run({name: value for name, value in manifest.items() if name != "status"})
        raise InvalidResource(tuple(Problem(path="status", message=item["msg"]) for item in error.errors())) from None


def _look_again(
    run: TrainingRun, plan: Plan, belongings: Belongings, obstacles: Obstacles, *, made: bool
) -> float | None:
    """Return after how many seconds to look again: what a run waits for is not always watched."""
    waits = [plan.requeue_after] if plan.requeue_after is not None else []
    if obstacles.refs:
        waits.append(_OBSTACLE_SECONDS)
    if made:
        # Nobody tells of what was made here, and deadlines count from when it was.
        waits.append(MADE_SECONDS)
    reference = _reference_seconds(run, plan, belongings)
    if reference is not None:
        waits.append(reference)
    if needs_events(run, belongings):
        waits.append(PATIENCE.total_seconds())
    return min(waits, default=None)


def _flavors_of(run: TrainingRun, belongings: Belongings) -> tuple[str, ...]:
    """Return the flavors that quota is reserved in."""
    workload = belongings.objects.get(workload_ref(run.metadata.name))
    return parse_workload(workload).flavors if workload is not None else ()


def _priority_classes_of(run: TrainingRun) -> tuple[str, ...]:
    name = run.spec.resources.workload_priority_class
    return (name,) if name is not None and run.spec.resources.queue_name is not None else ()


def _code_ref(run: TrainingRun) -> ObjectRef:
    return ObjectRef(*CONFIG_MAP, names.code_name(run.metadata.name))


def _reference_seconds(run: TrainingRun, plan: Plan, belongings: Belongings) -> float | None:
    """Return when to look again for what nobody watches: own code, or what Kueue's administrators set up."""
    if plan.status is None or plan.status.completion_time is not None:
        return None
    reasons = {condition.reason for condition in plan.status.conditions or ()}
    if "FlavorMissing" in reasons:
        return _FLAVOR_SECONDS
    code_is_lost = not plan.objects and run.spec.code is not None and _code_ref(run) not in belongings.objects
    return _REFERENCE_SECONDS if code_is_lost or reasons & {"ReferencePending", "KueueMissing"} else None


def _kind_of(manifest: Manifest) -> Kind:
    return manifest["apiVersion"], manifest["kind"]


def _name(run: TrainingRun) -> str:
    return f"{run.metadata.namespace}/{run.metadata.name}"
