"""`posttrain run FILE`: executes the TrainingRuns of a file on this machine, one after the other, until each has ended.

It owns the loop that a reconciler runs in a cluster (observe, plan, delete, apply, status, events), what a Ctrl-C means
and the exit code; it must not decide anything about the run, which is the plan's, nor read the run's storage.

The TTL of a run is not applied: what lies on a person's own disk goes when they remove it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty, SimpleQueue

from posttrain.api.conditions import ACCEPTED, FINISHED, STALLED, SUCCEEDED, find_condition, is_true
from posttrain.api.training_run import TrainingRun
from posttrain.api.training_run_status import TrainingRunStatus
from posttrain.contract.result import ExitCode
from posttrain.local.cluster import LocalCluster
from posttrain.local.environments import ensure_environment
from posttrain.local.interrupts import Interrupts
from posttrain.local.leftovers import end_leftovers
from posttrain.local.machine import Machine, observe_machine
from posttrain.local.needs import environments_by_image
from posttrain.local.packages import link_packages, point
from posttrain.local.pod_process import Site
from posttrain.local.references import observe_referenced
from posttrain.local.request import Options, Request, load_requests
from posttrain.local.server import ProgressServer
from posttrain.local.state import RunFolder, find_spec_changes, locked, refuse_changed_spec
from posttrain.local.state import state_root as default_state_root
from posttrain.local.store import RunStore, accept_run
from posttrain.local.view import SteadyView, View
from posttrain.plan.names import claim_name
from posttrain.plan.training_run import plan_training_run
from posttrain.plan.types import Plan
from posttrain.settings import Settings

EXIT_INTERRUPTED = 130
_LONGEST_WAIT_SECONDS = 60.0
_KILL_SECONDS = 15.0

Wakeups = SimpleQueue[None]
"""Whoever has news puts something in. The one queue that a signal handler may put into."""


def run_file(
    path: Path,
    *,
    sets: Sequence[str],
    claims: Mapping[str, Path],
    secrets: Mapping[str, Path],
    state_root: Path,
    cache: Path,
    open_view: Callable[[], AbstractContextManager[View]],
) -> int:
    """Execute the TrainingRuns in a file, each from wherever it stands, with a view of its own.

    Returns 0 Succeeded, 1 Failed, 2 the user's to mend; with anything but 0 the runs that follow are not begun.

    130: a run was interrupted, or is suspended. A first Ctrl-C (or SIGTERM, or a closed terminal) suspends it after a
    checkpoint, a second one ends it at once; the same command resumes it in both cases, and also after this process
    was killed.

    Raises:
        UserError: a resource is not valid, this machine cannot execute it, or somebody else does.
    """
    root = state_root.absolute()
    own_state = state_root if root != default_state_root() else None
    options = Options(file=path, sets=sets, claims=claims, secrets=secrets, state=own_state)
    machine = observe_machine()
    requests = load_requests(options, machine=machine, state_root=root)
    for number, request in enumerate(requests, 1):
        with open_view() as opened:
            view = SteadyView(opened)
            code = _run(request, options=options, machine=machine, state_root=root, cache=cache, view=view)
            if code == ExitCode.DONE:
                continue
            left = ", ".join(other.run.metadata.name for other in requests[number:])
            if left:
                view.message(f"Not begun, because of {request.run.metadata.name}: {left}.")
            return code
    return ExitCode.DONE


def _run(request: Request, *, options: Options, machine: Machine, state_root: Path, cache: Path, view: View) -> int:
    folder = RunFolder(state_root / request.run.metadata.name)
    referenced = observe_referenced(request.run.spec, state_root=state_root)
    claims = {**referenced.claims, **request.claims}
    wakeups: Wakeups = SimpleQueue()
    with Interrupts(lambda: wakeups.put(None)) as interrupts, locked(folder, command=options.command):
        try:
            stored = _resume(folder, request.run)
            if stored is not None and is_true(stored.status.conditions, FINISHED):
                return _show_finished(stored, folder=folder, view=view)
            interpreters = _ensure_environments(request, cache=cache, view=view)
            interrupts.deferred = True
            store = RunStore(folder, accept_run(request.run, stored=stored, now=_now()))
            _link(folder, run=store.run, claims=claims)
            with closing(ProgressServer(store, notify=lambda: wakeups.put(None), clock=_now)) as server:
                cluster = LocalCluster(
                    folder,
                    store=store,
                    site=_site(request, folder=folder, machine=machine, interpreters=interpreters, server=server),
                    claims=claims,
                    config_maps=request.config_maps,
                    runs=referenced.runs,
                    tokens=server,
                    notify=lambda: wakeups.put(None),
                    clock=_now,
                )
                with closing(cluster):
                    execution = Execution(folder, store=store, cluster=cluster, wakeups=wakeups, view=view)
                    return execution.run_to_end(request.settings, interrupts=interrupts, command=options.command)
        except KeyboardInterrupt:
            view.message(f"Interrupted. To go on: {options.command}")
            return EXIT_INTERRUPTED


def _resume(folder: RunFolder, given: TrainingRun) -> TrainingRun | None:
    """Return what is stored of the run; None to begin, also where nothing was trained and the spec or its end is old.

    Raises:
        UserError: another spec was trained under this name.
    """
    stored = folder.read_run()
    if stored is None:
        return None
    changes = find_spec_changes(stored.spec, given.spec)
    ended = is_true(stored.status.conditions, FINISHED)
    if not stored.status.attempt and (changes or ended):
        # What prepare found wrong has been mended: its findings are worth nothing now.
        end_leftovers(folder.pods)
        folder.clear()
        return None
    if changes:
        raise refuse_changed_spec(folder, changes=changes)
    return stored


def _show_finished(run: TrainingRun, *, folder: RunFolder, view: View) -> int:
    view.finish(run, folder)
    view.message(
        f"This run has ended before, and nothing was trained now. To train anew, give it another metadata.name "
        f"(--set metadata.name=NAME) or remove {folder.path}."
    )
    return exit_code(run.status)


def _refusal(status: TrainingRunStatus) -> str | None:
    """Return why nothing is done for the run until somebody changes something; None where that is not so."""
    accepted = find_condition(status.conditions, ACCEPTED)
    refused = accepted is not None and accepted.status == "False" and is_true(status.conditions, STALLED)
    return f"{accepted.reason}: {accepted.message}" if accepted is not None and refused else None


def exit_code(status: TrainingRunStatus) -> int:
    """Return the exit code that tells of a run's end."""
    if is_true(status.conditions, SUCCEEDED):
        return ExitCode.DONE
    accepted = find_condition(status.conditions, ACCEPTED)
    refused = accepted is not None and accepted.status == "False"
    of_the_user = status.failure is not None and status.failure.exit_code == ExitCode.INVALID
    return ExitCode.INVALID if refused or of_the_user else ExitCode.FAILED


def _ensure_environments(request: Request, *, cache: Path, view: View) -> dict[str, Path]:
    """Return the interpreters that the run's pods start, by the repository of their image."""
    interpreters = {}
    for image, name in environments_by_image(request.settings.images).items():
        if name in request.environments:
            view.stage(f"looking for the environment of the image {name}")
            interpreters[image] = ensure_environment(name, cache=cache, report=view.stage, announce=view.message)
    return interpreters


def _site(
    request: Request,
    *,
    folder: RunFolder,
    machine: Machine,
    interpreters: Mapping[str, Path],
    server: ProgressServer,
) -> Site:
    profile = request.settings.profiles[request.settings.default_profile]
    return Site(
        interpreters=interpreters,
        packages=folder.packages,
        machine=dict(os.environ),
        planned_server=request.settings.progress_server.url,
        server=server.url,
        node_name=machine.name,
        gpu_resource=profile.gpu_resource,
        gpus=tuple(gpu.device for gpu in machine.gpus),
        secrets=request.secrets,
    )


def _link(folder: RunFolder, *, run: TrainingRun, claims: Mapping[str, Path]) -> None:
    """Make the links in the run's folder: to the packages that its processes import, and to what it writes."""
    link_packages(folder.packages)
    name = run.metadata.name
    claim = run.spec.checkpoints.storage.claim_name or claim_name(name)
    point(folder.storage, claims.get(claim, folder.volumes / claim) / name)


class Execution:
    """The loop over one run."""

    def __init__(
        self, folder: RunFolder, *, store: RunStore, cluster: LocalCluster, wakeups: Wakeups, view: View
    ) -> None:
        self._folder = folder
        self._store = store
        self._cluster = cluster
        self._wakeups = wakeups
        self._view = view

    def run_to_end(self, settings: Settings, *, interrupts: Interrupts, command: str) -> int:
        """Reconcile until the run has ended or is suspended, and nothing of it is alive; return the exit code."""
        obeyed = 0
        killed_at = None
        while True:
            if interrupts.count > obeyed:
                obeyed = interrupts.count
                killed_at = self._obey(obeyed)
            plan = self._reconcile(settings)
            run = self._store.run
            over = not self._cluster.has_live_pods
            if over and is_true(run.status.conditions, FINISHED):
                self._view.finish(run, self._folder)
                return exit_code(run.status)
            refusal = _refusal(run.status) if over else None
            if refusal is not None:
                self._view.message(refusal)
                return exit_code(run.status)
            gave_up = killed_at is not None and time.monotonic() - killed_at > _KILL_SECONDS
            if (over and run.status.stage == "Suspended") or gave_up:
                self._view.message(_suspended_message(run, interrupted=obeyed > 0, command=command))
                return EXIT_INTERRUPTED
            self._wait(plan, longest_seconds=_LONGEST_WAIT_SECONDS if killed_at is None else _KILL_SECONDS / 10)

    def _obey(self, count: int) -> float | None:
        if count == 1:
            self._store.suspend()
            how = " after a checkpoint" if self._store.run.status.attempt else ""
            self._view.message(f"Stopping{how}. Ctrl-C again ends everything at once.")
            return None
        self._view.message("Ending everything at once.")
        self._cluster.kill()
        return time.monotonic()

    def _reconcile(self, settings: Settings) -> Plan:
        before = self._store.run.status
        observed = self._cluster.observe()
        plan = plan_training_run(self._store.run, observed, now=_now(), settings=settings)
        assert not plan.patches, "nobody else's controller keeps a status on this machine"
        assert plan.status is not None, "a plan of a TrainingRun has a status"
        if plan.status_first:
            self._cluster.apply_status(plan.status)
        for ref in plan.deletes:
            self._cluster.delete(ref)
        for manifest in plan.objects:
            self._cluster.apply(manifest)
        if not plan.status_first:
            self._cluster.apply_status(plan.status)
        for event in plan.events:
            self._view.event(event)
        run = self._store.run
        self._view.update(run)
        if (run.status.stage, run.status.attempt) != (before.stage, before.attempt):
            self._wakeups.put(None)
        return plan

    def _wait(self, plan: Plan, *, longest_seconds: float) -> None:
        """Wait until something has happened, or the plan or a job wants to look again."""
        waits = [longest_seconds]
        if plan.requeue_after is not None:
            waits.append(plan.requeue_after)
        if self._cluster.retry_at is not None:
            waits.append((self._cluster.retry_at - _now()).total_seconds())
        try:
            self._wakeups.get(timeout=max(min(waits), 0))
            while True:
                self._wakeups.get_nowait()
        except Empty:
            return


def _suspended_message(run: TrainingRun, *, interrupted: bool, command: str) -> str:
    if interrupted:
        return f"Stopped. To resume: {command}"
    if run.spec.suspend:
        return f"The run is suspended by its spec. To go on: {command} --set spec.suspend=false"
    succeeded = find_condition(run.status.conditions, SUCCEEDED)
    return f"The run is suspended. {succeeded.message if succeeded else ''}\nTo go on: {command}"


def _now() -> datetime:
    return datetime.now(UTC)
