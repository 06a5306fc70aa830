"""One rollout server as the trainer's rank 0 sees it: HTTP with time limits, and errors that name the server.

It owns the conversation with one vLLM server; it must not know that there are others, nor how weights travel.
"""

from __future__ import annotations

import errno
import os
import time
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from trl.generation.vllm_client import VLLMClient
from urllib3.connection import HTTPConnection
from urllib3.util.retry import Retry

from posttrain.contract.environment import ROLLOUT_KEY
from posttrain_workloads.keep_alive import KEEP_ALIVE, SocketOptions
from posttrain_workloads.rollout_errors import RolloutError, ServerLost

CONNECT_SECONDS = 10.0
_CONNECT_TRIES = 3
ANSWER_SECONDS = 60.0
"""For a request that a healthy server answers at once."""
ROLLOUT_SECONDS = 3600.0
"""For a batch of completions."""
_READY_POLL_SECONDS = 1.0
_GONE = frozenset({errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH})
"""By what the kernel says that nothing comes from a machine any more."""


class RolloutServer(VLLMClient):  # type: ignore[misc]
    """TRL's client for one server, without its retries: an update or a rollout that is sent twice is done twice."""

    def __init__(self, url: str, *, keep_alive: SocketOptions = KEEP_ALIVE) -> None:
        # Not the inherited one: it waits without limit for a server that takes connections and does not answer.
        self.base_url = url
        self.session = requests.Session()
        # What found no connection is tried again at once and after a second; what reached the server is not. `total`
        # would count before `connect`, and read=0 would turn a GET's ReadTimeout into a ConnectionError.
        retry = Retry(total=None, connect=_CONNECT_TRIES - 1, read=False, other=0, backoff_factor=0.5)
        self.session.mount("http://", _KeptAlive(keep_alive, max_retries=retry))
        if key := os.environ.get(ROLLOUT_KEY):
            self.session.headers["Authorization"] = f"Bearer {key}"

    def await_ready(self, deadline: float) -> None:
        """Wait until it answers, until `deadline` on the monotonic clock; learn the name of its model.

        Raises:
            ServerLost: it did not answer until then.
        """
        while True:
            try:
                self.ask("GET", "/health", ANSWER_SECONDS)
                self.model = self.ask("GET", "/v1/models", ANSWER_SECONDS).json()["data"][0]["id"]
                return
            except ServerLost:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_READY_POLL_SECONDS)

    def weight_version(self, seconds: float = ANSWER_SECONDS) -> str:
        """Return the version that was handed over to it last; a server that has just started has another one.

        While it waits for a tensor it does not answer.
        """
        return str(self.ask("GET", "/weight_info", seconds).json()["weight_version"])

    def get_server_info(self) -> dict[str, Any]:
        """Return the server's resolved configuration."""
        reply = self.ask("GET", "/server_info?config_format=json", ANSWER_SECONDS)
        config: dict[str, Any] = reply.json()["vllm_config"]
        return config

    def ask(self, method: str, path: str, seconds: float, body: Any = None) -> requests.Response:
        """Send one request and return the answer to it.

        Raises:
            ServerLost: no answer came, none within `seconds`, or that the server itself failed.
            RolloutError: it refused the request.
        """
        asked = f"{method} {path.partition('?')[0]}"
        try:
            answer = self.session.request(
                method, f"{self.base_url}{path}", json=body, timeout=(CONNECT_SECONDS, seconds)
            )
        except requests.exceptions.RequestException as error:
            why = _explain(error, asked=asked, seconds=seconds)
            raise ServerLost(f"the rollout server {self.base_url} {why}") from error
        if answer.status_code == 404:
            raise RolloutError(
                f"the rollout server {self.base_url} does not know {asked}: start it with VLLM_SERVER_DEV_MODE=1, and "
                "in the trainer's version of vLLM"
            )
        if answer.status_code == 401:
            raise RolloutError(
                f"the rollout server {self.base_url} refused the key in ${ROLLOUT_KEY}: give both the same"
            )
        if answer.status_code != 200:
            message = (
                f"the rollout server {self.base_url} answered {asked} with {answer.status_code}: {answer.text[:500]}"
            )
            if answer.status_code < 500:
                raise RolloutError(message)
            self.session.close()  # the server leaves a connection on which it failed
            raise ServerLost(f"{message}; its log says more")
        return answer

    # What the inherited methods ask through.

    def _get(self, url: str, **kwargs: Any) -> Any:
        assert not kwargs
        return self.ask("GET", url.removeprefix(self.base_url), ANSWER_SECONDS).json()

    def _post(self, url: str, json: Any = None) -> Any:
        return self.ask("POST", url.removeprefix(self.base_url), ROLLOUT_SECONDS, json).json()


class _KeptAlive(HTTPAdapter):
    """Connections that end when the machine at their other end is lost."""

    def __init__(self, options: SocketOptions, *, max_retries: Retry) -> None:
        self._options = options
        super().__init__(max_retries=max_retries)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        # Given, they take the place of urllib3's own.
        options = [*HTTPConnection.default_socket_options, *self._options]
        super().init_poolmanager(*args, **kwargs, socket_options=options)


def _explain(error: requests.exceptions.RequestException, *, asked: str, seconds: float) -> str:
    """Return what a server did that gave no answer, and the likely cause."""
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return (
            f"took no connection in {_CONNECT_TRIES} tries of {CONNECT_SECONDS:g} s ({asked}): its node or the "
            "network to it is gone, or a NetworkPolicy keeps the trainer out"
        )
    if _is_gone(error):  # of which requests makes a ReadTimeout, too
        return f"is gone without a word ({asked}): its node is lost, or the network to it"
    if isinstance(error, requests.exceptions.ReadTimeout):
        return (
            f"did not answer {asked} within {seconds:g} s: it hangs, or has more to do than it can; its log says which"
        )
    return (
        f"cannot be reached ({asked}): it has ended, or has not started yet; the end of its log says why "
        f"({_innermost(error)})"
    )


def _is_gone(error: BaseException | None) -> bool:
    """Return whether the kernel gave the connection up, for want of any answer to its packets."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _GONE:
            return True
        error = error.__cause__ or error.__context__
    return False


def _innermost(error: BaseException) -> str:
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    reason = getattr(error, "reason", None)
    return _innermost(reason) if isinstance(reason, BaseException) else str(error)
