"""The beginning of a hand-over of weights on a vLLM server, and the ends of one that broke off.

It owns what a server is told then, by what it is known to be in the middle of a hand-over, and when the trainer's end
of one will never return; it must not know how weights travel.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any, Protocol

from posttrain_workloads.failures import explain_failure
from posttrain_workloads.rollout_errors import ServerLost
from posttrain_workloads.runtime import end_rank

_BEGUN = "incomplete"
"""The version of a server in the middle of a hand-over, which no trainer asks for."""
_ABANDONED = "abandoned"
_NONE_BEGUN = "finish_weight_update called without a matching start_weight_update"
"""vLLM's answer where there is no hand-over to end (v1/worker/gpu_worker.py)."""
_STUCK_SECONDS = 10.0
"""After a server's failure: what does not return by then is taken never to return."""
_SECONDS = 660.0
"""A server that waits for a tensor of a trainer that is gone answers nothing until it has given up."""


class Server(Protocol):
    """As much of a `RolloutServer` as is needed here."""

    def weight_version(self, seconds: float) -> str:
        """Return the version that was handed over to it last."""

    def ask(self, method: str, path: str, seconds: float, body: Any = None) -> Any:
        """Send one request and return the answer to it."""


def begin_hand_over(server: Server) -> None:
    """Let the server expect new weights; from here on it has no version that could be sampled from."""
    server.ask("POST", "/update_weight_version", _SECONDS, {"new_version": _BEGUN})
    server.ask("POST", "/start_weight_update", _SECONDS, {})


def abandon_hand_over(server: Server) -> None:
    """End the hand-over that a trainer before this one left half done, where there is one.

    A server in the middle of one begins no other. Where its tensors broke off vLLM takes it for ended, and yet keeps
    those that each layer has got: the next ones would be counted on top of them, and the last dropped without a word
    (model_executor/model_loader/reload/layerwise.py of 0.31). One without any tensor clears them. The half of the
    weights that are new matter to nobody: the version is of no trainer.

    Raises:
        ServerLost: it does not answer, or cannot end it; only its restart helps.
    """
    if server.weight_version(_SECONDS) != _BEGUN:
        return
    try:
        _finish(server)
    except ServerLost as error:
        if _NONE_BEGUN not in str(error):
            raise
        server.ask("POST", "/start_weight_update", _SECONDS, {})
        _finish(server)


@contextmanager
def end_where_stuck(replies: Sequence[Future[Any]], *, seconds: float = _STUCK_SECONDS) -> Iterator[None]:
    """End this rank with what a server failed by, where the block still sends `seconds` later.

    NCCL waits without limit for a member of its group that is gone, and nothing in this process can end that but the
    process's own end. `replies` are the servers' to the announcement of what the block sends.
    """
    over = Event()

    def watch() -> None:
        errors = [error for reply in wait(replies, return_when=FIRST_EXCEPTION).done if (error := reply.exception())]
        if errors and not over.wait(seconds):
            logging.error("the weights are still being sent %s s after a server failed: this rank ends", seconds)
            end_rank(explain_failure(errors[0]), environ=os.environ)

    Thread(target=watch, name="hand-over-watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _finish(server: Server) -> None:
    server.ask("POST", "/finish_weight_update", _SECONDS, {"weight_version": _ABANDONED})
