"""Who reports: from a bearer token to the run and the attempt that its pod belongs to.

It owns the proof and how long it holds; it must not believe a label that the pod's owners do not bear out.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from posttrain.control.kinds import JOB, POD, PYTORCHJOB, TOKEN_REVIEW, TRAINING_RUN, Kind
from posttrain.control.observe import controller_of
from posttrain.control.port import Cluster, NotFound, ObjectKey, Rejected, Unavailable
from posttrain.control.progress import RunGone, RunIdentity
from posttrain.plan import labels, names
from posttrain.plan.types import Manifest

_POD_NAME = "authentication.kubernetes.io/pod-name"
_POD_UID = "authentication.kubernetes.io/pod-uid"

_PROOF_SECONDS = 60.0
_REFUSAL_SECONDS = 5.0
_NOT_YET_SECONDS = 2.0
_CACHED_MAX = 10_000
_REVIEWS_AT_ONCE = 8
_PROVEN_PODS_MAX = 10_000


class Unauthenticated(Exception):
    """The token is none that the API server knows, or not for this run."""


class Forbidden(Exception):
    """The token is a pod's that may not report for this run."""


@dataclass(frozen=True, kw_only=True)
class Sender:
    """What a token proves."""

    run: RunIdentity
    attempt: int
    pod: str


@dataclass(frozen=True, kw_only=True)
class _Verdict:
    sender: Sender | None
    refusal: Unauthenticated | Forbidden | RunGone | None
    until: float


class Authenticator:
    """Proves senders through the API server, one review for all requests of a token at a time."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        wall_clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._wall_clock = wall_clock
        self._monotonic = monotonic
        self._verdicts: OrderedDict[str, _Verdict] = OrderedDict()
        self._proven: OrderedDict[str, Sender] = OrderedDict()
        """By pod uid: a pod never changes its owners, and it outlives its job while it saves a last checkpoint."""
        self._reviewing: dict[str, asyncio.Task[Sender]] = {}
        self._requests = asyncio.Semaphore(_REVIEWS_AT_ONCE)

    async def prove(self, token: str, *, namespace: str, run: str) -> Sender:
        """Return who sends with that token to that run's address.

        Raises:
            Unauthenticated: the token proves nothing here.
            Forbidden: its pod does not belong to the run.
            RunGone: there is no such run.
            Unavailable: the API server does not answer, or does not know the attempt yet.
        """
        audience = names.resource_path(namespace=namespace, run=run)
        key = _key(token, audience=audience)
        known = self._verdict(key)
        if known is not None:
            self._verdicts.move_to_end(key)
            return _outcome(known)
        review = self._reviewing.get(key)
        if review is None:
            review = asyncio.create_task(self._review(key, token, namespace=namespace, run=run, audience=audience))
            self._reviewing[key] = review
            review.add_done_callback(lambda done: self._end_review(key, done))
        return await asyncio.shield(review)

    def needs_review(self, token: str, *, namespace: str, run: str) -> bool:
        """Return whether the API server will be asked about the token: its proof is new, or has run out."""
        key = _key(token, audience=names.resource_path(namespace=namespace, run=run))
        return self._verdict(key) is None and key not in self._reviewing

    def _verdict(self, key: str) -> _Verdict | None:
        known = self._verdicts.get(key)
        return known if known is not None and known.until > self._monotonic() else None

    async def _review(self, key: str, token: str, *, namespace: str, run: str, audience: str) -> Sender:
        try:
            async with self._requests:
                sender = await self._ask(token, namespace=namespace, run=run, audience=audience)
        except (Unauthenticated, Forbidden, RunGone) as refusal:
            until = self._monotonic() + _REFUSAL_SECONDS
            self._remember(key, _Verdict(sender=None, refusal=refusal, until=until))
            raise
        expires = _expiry(token)
        left = _PROOF_SECONDS if expires is None else min(_PROOF_SECONDS, expires - self._wall_clock())
        self._remember(key, _Verdict(sender=sender, refusal=None, until=self._monotonic() + left))
        return sender

    def _end_review(self, key: str, review: asyncio.Task[Sender]) -> None:
        del self._reviewing[key]
        if not review.cancelled():
            review.exception()  # every request that wanted it may have gone away

    def _remember(self, key: str, verdict: _Verdict) -> None:
        self._verdicts[key] = verdict
        self._verdicts.move_to_end(key)
        while len(self._verdicts) > _CACHED_MAX:
            self._verdicts.popitem(last=False)

    # --- The proof ---------------------------------------------------------------------------------------------------

    async def _ask(self, token: str, *, namespace: str, run: str, audience: str) -> Sender:
        name, uid = await self._review_token(token, audience=audience)
        pod = await self._find(POD, namespace=namespace, name=name, uid=uid)
        if pod is None:
            raise Forbidden(f"the token's pod {name} is not in namespace {namespace}, or is another one by now")
        identity, current = await self._read_run(namespace=namespace, run=run)
        sender = self._proven.get(uid)
        if sender is None or sender.run != identity:
            sender = Sender(run=identity, attempt=await self._attempt_of(pod, identity), pod=name)
            self._proven[uid] = sender
            while len(self._proven) > _PROVEN_PODS_MAX:
                self._proven.popitem(last=False)
        if sender.attempt > current:
            # The operator writes the attempt's number right after it made the attempt's pods.
            raise Unavailable(
                f"attempt {sender.attempt} is not in the status of {identity} yet", retry_after=_NOT_YET_SECONDS
            )
        return sender

    async def _review_token(self, token: str, *, audience: str) -> tuple[str, str]:
        """Return the name and uid of the pod that the token is bound to."""
        api_version, kind = TOKEN_REVIEW
        review: Manifest = {
            "apiVersion": api_version,
            "kind": kind,
            "metadata": {},
            "spec": {"token": token, "audiences": [audience]},
        }
        try:
            answer = (await self._cluster.create(review)).get("status") or {}
        except Rejected as error:
            raise Unavailable(f"tokens cannot be reviewed: {error}") from error
        # One that knows no audiences answers without any, and would take every token of the cluster.
        if not answer.get("authenticated") or audience not in (answer.get("audiences") or ()):
            raise Unauthenticated("the bearer token is wrong, has expired, or is not for this run")
        extra = (answer.get("user") or {}).get("extra") or {}
        name, uid = (next(iter(extra.get(field) or ()), "") for field in (_POD_NAME, _POD_UID))
        if not name or not uid:
            raise Forbidden("the token is bound to no pod: only a pod's projected token can report")
        return name, uid

    async def _read_run(self, *, namespace: str, run: str) -> tuple[RunIdentity, int]:
        """Return the run and the number of its current attempt."""
        try:
            found = await self._cluster.get(ObjectKey(*TRAINING_RUN, namespace, run))
        except NotFound:
            raise RunGone(f"there is no TrainingRun {namespace}/{run}") from None
        identity = RunIdentity(namespace, run, found["metadata"]["uid"])
        return identity, int((found.get("status") or {}).get("attempt") or 0)

    async def _attempt_of(self, pod: Manifest, run: RunIdentity) -> int:
        """Return the attempt that the pod's labels name and its owners bear out."""
        own = pod["metadata"].get("labels") or {}
        name = pod["metadata"]["name"]
        if own.get(labels.RUN) != run.name:
            raise Forbidden(f"pod {name} is not labelled {labels.RUN}={run.name}")
        owner = controller_of(pod) or {}
        kind: Kind = (owner.get("apiVersion", ""), owner.get("kind", ""))
        attempt = _attempt_by_job(kind, run=run.name, job=owner.get("name", ""))
        if attempt is None:
            raise Forbidden(f"pod {name} is not controlled by a job of {run}")
        if own.get(labels.ATTEMPT) != str(attempt):
            raise Forbidden(f"pod {name} is labelled {labels.ATTEMPT}={own.get(labels.ATTEMPT)} and of {attempt}")
        job = await self._find(kind, namespace=run.namespace, name=owner["name"], uid=owner.get("uid", ""))
        if job is None or not _is_controlled_by(job, run):
            raise Forbidden(f"{kind[1]} {owner['name']}, which controls pod {name}, is not controlled by {run}")
        return attempt

    async def _find(self, kind: Kind, *, namespace: str, name: str, uid: str) -> Manifest | None:
        try:
            found = await self._cluster.get(ObjectKey(*kind, namespace, name))
        except NotFound:
            return None
        return found if found["metadata"]["uid"] == uid else None


def _key(token: str, *, audience: str) -> str:
    return hashlib.sha256(f"{audience}\0{token}".encode()).hexdigest()


def _outcome(verdict: _Verdict) -> Sender:
    if verdict.sender is not None:
        return verdict.sender
    assert verdict.refusal is not None
    # A fresh one each time: an exception that is raised again grows by a traceback.
    raise type(verdict.refusal)(str(verdict.refusal))


def _is_controlled_by(job: Manifest, run: RunIdentity) -> bool:
    owner = controller_of(job) or {}
    return (owner.get("apiVersion"), owner.get("kind"), owner.get("uid")) == (*TRAINING_RUN, run.uid)


def _attempt_by_job(kind: Kind, *, run: str, job: str) -> int | None:
    if kind == PYTORCHJOB:
        return names.attempt_of(run, name=job)
    return names.PREPARE_ATTEMPT if kind == JOB and job == names.prepare_name(run) else None


def _expiry(token: str) -> float | None:
    """Return the `exp` claim of a token that the API server has verified, or None where it has none to read."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except ValueError:
        return None
    expires = claims.get("exp") if isinstance(claims, dict) else None
    return float(expires) if isinstance(expires, int | float) else None
