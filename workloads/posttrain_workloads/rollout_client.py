"""TRL's vLLM client for several servers: prompts are spread over them, weights are handed over to all of them.

It owns which server has which weights, and the group in which weights travel; it must not train or judge completions.
A hand-over is done when every server has acknowledged its version. A server that was restarted has another one: it gets
no prompts until the next hand-over, which opens the group anew with it.
"""

from __future__ import annotations

import atexit
import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from trl.generation.vllm_client import VLLMClient
from vllm.distributed.weight_transfer.nccl_common import trainer_init
from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

from posttrain_workloads._compat import copy_as_they_are
from posttrain_workloads.rollout_engine import BROADCAST_SECONDS, JOIN_SECONDS, GlooGroup
from posttrain_workloads.rollout_errors import RolloutError, ServerLost
from posttrain_workloads.rollout_hand_over import abandon_hand_over, begin_hand_over, end_where_stuck
from posttrain_workloads.rollout_plugin import GLOO
from posttrain_workloads.rollout_server import ANSWER_SECONDS, RolloutServer

_NCCL = "nccl"
_UPDATE_SECONDS = 1800.0
"""For all tensors of a hand-over."""
_POLL_SECONDS = 0.0002
_BLAME_SECONDS = 5.0
"""How long a broken broadcast waits for the server that broke it to be known."""
_Answer = TypeVar("_Answer")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a completion comes from."""

    server: str
    """URL."""
    weights: str | None
    """The version that was handed over; None: the model as the server loaded it."""


class RolloutClient(VLLMClient):  # type: ignore[misc]
    """What GRPOTrainer asks for completions, on its rank 0; `base_url` has every server's URL, with commas between.

    Raises (each method that speaks with servers):
        ServerLost: a server does not answer, or ended in the middle of a hand-over.
        RolloutError: a server refused, with its words.
    """

    def __init__(self, base_url: str, *, group_port: int = 51216, connection_timeout: float = 240.0) -> None:
        # Not the inherited one, which makes a connection to one server.
        urls = [url.strip().rstrip("/") for url in base_url.split(",")]
        if len(set(urls)) < len(urls):
            raise RolloutError(f"a rollout server is named twice in {base_url}: name each once")
        self.servers = tuple(RolloutServer(url) for url in urls)
        self.group_port = group_port
        self.communicator: Any = None
        self.version: str | None = None
        """Of the weights that every server has acknowledged; None before the first hand-over, -incomplete in one."""
        self.origins: tuple[Origin, ...] = ()
        """Of the completions that `generate` returned last, in their order."""
        self._ready_seconds = connection_timeout
        self._updating_weights = False
        self._trainer = uuid.uuid4().hex[:8]
        self._hand_overs = 0
        self._await_ready()
        # For what is inherited and asks one server.
        first = self.servers[0]
        self.base_url, self.session, self.model = first.base_url, first.session, first.model

    def get_server_info(self) -> dict[str, Any]:
        """Return the first server's resolved configuration."""
        return self.servers[0].get_server_info()

    # --- Completions -------------------------------------------------------------------------------------------------

    def generate(self, prompts: list[Any], features: list[Any] | None = None, n: int = 1, **sampling: Any) -> Any:
        """Return `n` completions a prompt as the inherited method does, from all servers that have the weights.

        What a server does not finish goes to the others.
        """
        servers = self._servers_with_weights()
        waiting = list(range(len(prompts)))
        outputs: dict[int, tuple[RolloutServer, dict[str, Any], int]] = {}
        while waiting:
            if not servers:
                raise ServerLost(
                    f"no rollout server has the weights {self.version} any more, and only a hand-over brings them back"
                )
            shares = [(server, waiting[place :: len(servers)]) for place, server in enumerate(servers)]
            asked = [
                (server, share, _start(partial(_generate, server, share, prompts, features, n, sampling)))
                for server, share in shares
                if share
            ]
            waiting = []
            for server, share, future in asked:
                try:
                    output = future.result()
                except ServerLost as error:
                    _log.warning("%s; its %d prompts go to the others", error, len(share))
                    servers.remove(server)
                    waiting += share
                    continue
                outputs |= {index: (server, output, place) for place, index in enumerate(share)}
        return self._join(outputs, n=n)

    def image_features(self, images: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Let one server process images; what it returns is of use to all."""
        return self.servers[0].image_features(images, *args, **kwargs)

    def _servers_with_weights(self) -> list[RolloutServer]:
        have = []
        for server, future in [(server, _start(server.weight_version)) for server in self.servers]:
            try:
                version = future.result()
            except ServerLost as error:
                _log.warning("%s; it gets no prompts until the next hand-over", error)
                continue
            if self.version in {None, version}:
                have.append(server)
            else:
                _log.warning(
                    "the rollout server %s has the weights %s instead of %s, because it was restarted; it gets no "
                    "prompts until the next hand-over",
                    *(server.base_url, version, self.version),
                )
        return have

    def _join(self, outputs: dict[int, tuple[RolloutServer, dict[str, Any], int]], *, n: int) -> dict[str, Any]:
        ordered = [outputs[index] for index in range(len(outputs))]
        joined: dict[str, Any] = {
            "prompt_ids": [output["prompt_ids"][place] for _, output, place in ordered],
            "completion_ids": [ids for _, output, place in ordered for ids in _of(output["completion_ids"], place, n)],
        }
        for key in ("logprobs", "logprob_token_ids"):
            given = all(output[key] is not None for _, output, _ in ordered)
            joined[key] = [v for _, output, place in ordered for v in _of(output[key], place, n)] if given else None
        self.origins = tuple(
            Origin(server=server.base_url, weights=self.version) for server, _, _ in ordered for _ in range(n)
        )
        return joined

    # --- Weights -----------------------------------------------------------------------------------------------------

    def init_communicator(self, device: torch.device | str | int = 0) -> None:
        """Open the group in which weights travel: over gloo if the trainer's `device` is a CPU, else over NCCL."""
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        self._backend = GLOO if device.type == "cpu" else _NCCL
        for server, info in zip(self.servers, self._each(RolloutServer.get_server_info), strict=True):
            config = info["weight_transfer_config"]
            if config is None or config["backend"] != self._backend:
                raise RolloutError(
                    f"the rollout server {server.base_url} takes weights by {config and config['backend']}, and the "
                    f"trainer on {device.type} sends them by {self._backend}: start it with "
                    f"""--weight-transfer-config '{{"backend": "{self._backend}"}}'"""
                )
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # where vLLM opens the trainer's end
        self._open_group()
        atexit.register(self.close_communicator)

    @contextmanager
    def weight_update(self) -> Iterator[None]:
        """Make one hand-over of all tensors of the block; of none, where it raises."""
        self._start_weight_update()
        self._updating_weights = True
        try:
            yield
        finally:
            self._updating_weights = False
        self._finish_weight_update()

    def update_named_params(
        self,
        metadata: list[tuple[str, str, list[int]]],
        named_params: Iterator[tuple[str, torch.Tensor]],
    ) -> None:
        """Hand weights over to every server: `metadata` has name, dtype and shape of each tensor that follows."""
        names, dtypes, shapes = (list(field) for field in zip(*metadata, strict=True))
        announced = {"update_info": {"names": names, "dtype_names": dtypes, "shapes": shapes}}
        if not self._updating_weights:
            self._start_weight_update()
        replies = [
            _start(partial(server.ask, "POST", "/update_weights", _UPDATE_SECONDS, announced))
            for server in self.servers
        ]
        try:
            self._send(named_params, replies)
        except RuntimeError as error:  # torch's, when a member of the group is gone
            _raise_first(wait(replies, timeout=_BLAME_SECONDS, return_when=FIRST_EXCEPTION).done)
            raise ServerLost(f"the hand-over of weights broke, and no server says why: {error}") from error
        _finish(replies)
        if not self._updating_weights:
            self._finish_weight_update()

    def reset_prefix_cache(self) -> None:
        """Let every server forget what it computed with other weights."""
        for server, answer in zip(self.servers, self._ask_each("/reset_prefix_cache"), strict=True):
            if not answer.json()["success"]:
                raise RolloutError(
                    f"the rollout server {server.base_url} keeps what it computed with the weights before: somebody "
                    "else has requests running there; only the trainer may ask it"
                )

    def close_communicator(self) -> None:
        """Leave the group."""
        if self.communicator is not None and self._backend == _NCCL:
            super().close_communicator()
        self.communicator = None

    def _start_weight_update(self) -> None:
        self._await_ready()
        if self.version is not None and set(self._each(RolloutServer.weight_version)) != {self.version}:
            _log.warning("a rollout server was restarted: the group for weights is opened anew")
            self._open_group()
        self.version = f"{self._next_version()}-incomplete"  # which no server has: nothing is sampled from a half
        self._each(begin_hand_over)

    def _finish_weight_update(self) -> None:
        version = self._next_version()
        self._ask_each("/finish_weight_update", {"weight_version": version})
        for server, has in zip(self.servers, self._each(RolloutServer.weight_version), strict=True):
            if has != version:
                raise ServerLost(f"the rollout server {server.base_url} acknowledged {version} and then has {has}")
        self.version = version
        self._hand_overs += 1

    def _next_version(self) -> str:
        return f"{self._trainer}-{self._hand_overs + 1}"

    def _open_group(self) -> None:
        self.close_communicator()
        self._each(abandon_hand_over)
        sizes: list[int] = self._each(RolloutServer.get_world_size)
        address = _address_towards(self.servers[0])
        group = {
            "master_address": address,
            "master_port": _free_port(address, wanted=self.group_port),
            "world_size": 1 + sum(sizes),
        }
        members: list[Future[Any]] = [_start(partial(self._open_own_end, group))]
        for place, server in enumerate(self.servers):
            join = {**group, "rank_offset": 1 + sum(sizes[:place]), "packed": self._backend == _NCCL}
            seconds = JOIN_SECONDS + ANSWER_SECONDS
            ask = partial(server.ask, "POST", "/init_weight_transfer_engine", seconds, {"init_info": join})
            members.append(_start(ask))
        _finish(members)
        self.communicator = members[0].result()

    def _open_own_end(self, group: dict[str, Any]) -> Any:
        address, port, size = group["master_address"], group["master_port"], group["world_size"]
        if self._backend == _NCCL:
            return trainer_init(group)
        try:
            return GlooGroup(address=address, port=port, rank=0, world_size=size)
        except RuntimeError as error:
            raise ServerLost(
                f"the group for weights did not come together at {address}:{port}: either another program has the "
                f"port, or a rollout server cannot reach the trainer there ({error})"
            ) from error

    def _send(self, named_params: Iterator[tuple[str, torch.Tensor]], replies: list[Future[Any]]) -> None:
        if self._backend == _NCCL:
            with end_where_stuck(replies):
                packed_nccl_broadcast_producer(
                    iterator=copy_as_they_are(named_params),
                    group=self.communicator,
                    src=0,
                    post_iter_func=lambda item: item[1],
                )
            return
        for _, weight in named_params:
            plain = weight.detach().contiguous()
            work = self.communicator.broadcast(plain)
            while not work.is_completed():
                _raise_first(reply for reply in replies if reply.done())  # a server that refused takes nothing
                time.sleep(_POLL_SECONDS)
            work.wait()

    # --- All servers at once -----------------------------------------------------------------------------------------

    def _await_ready(self) -> None:
        deadline = time.monotonic() + self._ready_seconds
        self._each(lambda server: server.await_ready(deadline))

    def _each(self, action: Callable[[RolloutServer], _Answer]) -> list[_Answer]:
        return _finish([_start(partial(action, server)) for server in self.servers])

    def _ask_each(self, path: str, body: Any = None) -> list[Any]:
        return self._each(lambda server: server.ask("POST", path, BROADCAST_SECONDS, body))


def _generate(
    server: RolloutServer,
    share: list[int],
    prompts: list[Any],
    features: list[Any] | None,
    n: int,
    sampling: dict[str, Any],
) -> dict[str, Any]:
    output: dict[str, Any] = server.generate(
        [prompts[index] for index in share],
        features=None if features is None else [features[index] for index in share],
        n=n,
        **sampling,
    )
    return output


def _of(values: list[Any], place: int, n: int) -> list[Any]:
    return values[place * n : (place + 1) * n]


def _address_towards(server: RolloutServer) -> str:
    """Return this machine's address as the server sees it."""
    url = urlsplit(server.base_url)
    with socket.create_connection((url.hostname or "", url.port or 80), timeout=ANSWER_SECONDS) as connection:
        return str(connection.getsockname()[0])


def _free_port(address: str, *, wanted: int) -> int:
    """Return the wanted port; on one machine, whose runs share its ports, another one where that is taken."""
    if not ip_address(address).is_loopback:
        return wanted
    with socket.socket() as probe:
        try:
            probe.bind(("", wanted))
        except OSError:
            probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _start(action: Callable[[], _Answer]) -> Future[_Answer]:
    """Begin in a thread that does not keep the process alive: one that hangs must not."""
    future: Future[_Answer] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def _finish(futures: list[Future[_Answer]]) -> list[_Answer]:
    """Wait for all; raise what the first one raises that fails, without waiting for the rest."""
    _raise_first(wait(futures, return_when=FIRST_EXCEPTION).done)
    return [future.result() for future in futures]


def _raise_first(done: Iterable[Future[Any]]) -> None:
    for future in done:
        future.result()
