"""After each hand-over every vLLM server computes with the trainer's weights, and a server that does not is noticed.

One process of vLLM's environment runs all cases against two real servers, which are started once and together. The
first one has two copies of the model. The second one is first of all the negative control: its linear layers compute
with packed copies, as vLLM has it. When it has been killed it comes back as a server of two nodes, each with half a
model.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import wait_for
from tests.workloads._configs import build_grpo_config, free_port
from tests.workloads._rollout import CASES, Server, add_dropping_plugin, environment, start

pytestmark = [pytest.mark.workloads, pytest.mark.rollouts, pytest.mark.timeout(2400)]

START_SECONDS = 900.0
CASES_SECONDS = 900.0
OPTIONS: list[dict[str, Any]] = [
    {
        "gpu-memory-utilization": 0.9,
        "max-num-seqs": 16,
        "enforce-eager": True,
        "no-enable-prefix-caching": True,
        "compilation-config": {"mode": 0},
        "cudagraph-capture-sizes": [1, 2, 4],
        "lora-modules": [{"name": "a", "path": "/a"}],
    },
    {"max-num-seq": 8, "seed": "one"},
    {"kv-cache-dtype": "fp9", "tensor-parallel": 2, "weather": "fine"},
    {"enable-prefix-caching": "yes", "compilation-config": {"mode": "quick"}},
]
_PLAIN = "posttrain_plain_weights"


class Process:
    """A process of vLLM's environment that runs cases, or several ranks of one."""

    def __init__(self, python: Path, folder: Path, cases: dict[str, Any], *, ranks: int = 1) -> None:
        folder.mkdir()
        self._out, self._log = folder / "out.json", folder / "cases.log"
        (folder / "cases.json").write_text(json.dumps(cases))
        torchrun = ("-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, *(torchrun if ranks > 1 else ()), CASES, folder / "cases.json", self._out],
                env=environment(folder),
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def answers(self) -> dict[str, Any]:
        """Wait for its end; return what every case found."""
        wait_for(self.has_ended, what=str(self._log), seconds=CASES_SECONDS)
        assert self._process.returncode == 0, self._log.read_text()[-5000:]
        print(*[line for line in self._log.read_text().splitlines() if line.endswith(" s")], sep="\n")
        return json.loads(self._out.read_text())

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def colocated(vllm_python: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A training with the engine inside it, which runs beside the other cases."""
    folder = tmp_path_factory.mktemp("colocated") / "process"
    case = {"model": str(tiny_model), "mode": "colocate", "folder": str(folder / "training")}
    process = Process(vllm_python, folder, {"colocate": case})
    yield process
    process.kill()


def options_case(model: Path) -> dict[str, Any]:
    """Options of `vllm serve` as a run may have them: good ones first."""
    rollout = {"mode": "Server", "server": {"gpusPerNode": 0}}
    config = build_grpo_config(model=model, rows=model, rewards=[{"name": "format"}], grpo={"rollout": rollout})
    return {"config": json.loads(config.to_json()), "args": OPTIONS}


@pytest.fixture(scope="module")
def found(
    vllm_python: Path, tiny_model: Path, colocated: Process, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """What every case found, by its name, and the servers' URLs."""
    folder = tmp_path_factory.mktemp("rollout")
    drop = folder / "drop"
    with ExitStack() as ending:

        def serve(
            name: str,
            *options: str,
            port: int | None = None,
            node: tuple[int, int] | None = None,
            variables: dict[str, str] | None = None,
        ) -> Server:
            server = start(
                vllm_python,
                tiny_model,
                folder / name,
                port=port or free_port(),
                options=options,
                node=node,
                variables=variables or {},
            )
            ending.callback(server.kill)
            return server

        began = time.monotonic()
        first = serve("first", "--data-parallel-size=2")
        packed = serve("packed", variables={"VLLM_PLUGINS": "posttrain_gloo"})
        for server in (first, packed):
            wait_for(server.is_ready, what=str(server.log), seconds=START_SECONDS)
        print(f"two servers: {time.monotonic() - began:.0f} s to their start")
        alike = first_completions(first, of_each=2)  # of a server that has drawn nothing yet

        taken = ending.enter_context(socket.create_server(("", 0)))  # by another run on this machine, say
        servers = [first.url, packed.url]
        common = {"model": str(tiny_model), "servers": servers}
        training = {**common, "mode": "server", "folder": str(folder / "training")}
        cases = Process(
            vllm_python,
            folder / "cases",
            {
                "options": options_case(tiny_model),
                "packed": {**common, "port": free_port(), "times": 1},
                "rejoin": {**common, "port": free_port(), "pid": packed.process.pid},
                "hand_over": {**common, "port": taken.getsockname()[1], "times": 2},
                "spread": {**common, "port": free_port()},
                "refuse": {"servers": servers},
                "pack": {"model": str(tiny_model)},
                "train": {**training, "port": free_port()},
                "train_dropped": {**training, "port": free_port(), "drop": str(drop)},
            },
        )
        ending.callback(cases.kill)
        wait_for(
            lambda: packed.process.poll() is not None or cases.has_ended(),
            what="the case that kills the second server",
            seconds=CASES_SECONDS,
        )
        if not cases.has_ended():
            port, meeting = int(packed.url.rpartition(":")[2]), free_port()
            for node in range(2):
                name = f"second-{node}"
                add_dropping_plugin(folder / name / "packages")
                serve(
                    name,
                    "--tensor-parallel-size=2",
                    port=None if node else port,
                    node=(node, meeting),
                    variables={"VLLM_PLUGINS": f"dropping,{_PLAIN}", "DROP_WHILE": str(drop)},
                )
        answers = cases.answers()
        case = {"model": str(tiny_model), "server": first.url, "port": free_port()}
        sharded = Process(vllm_python, folder / "shards", {"shards": case}, ranks=2)
        ending.callback(sharded.kill)
        yield {
            **answers,
            **sharded.answers(),
            "servers": servers,
            "copies": copies_that_generated(first),
            "alike": alike,
        }


def first_completions(server: Server, *, of_each: int) -> list[str]:
    """Return completions of one prompt, which are dealt out to the copies of the model."""
    asked = {"prompt": [5, 6, 7, 8], "n": of_each, "max_tokens": 12, "temperature": 1.0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return [choice["text"] for choice in json.load(answer)["choices"]]


def copies_that_generated(server: Server) -> list[str]:
    """Return the number of each copy of the model of which a server counts tokens."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        metrics: str = answer.read().decode()
    counts = re.findall(r'^vllm:generation_tokens_total{engine="(\d+)".*} (.+)$', metrics, re.MULTILINE)
    return sorted(engine for engine, tokens in counts if float(tokens) > 0)


def test_options_of_the_servers_are_read_as_vllm_would_read_them(found: dict[str, Any]) -> None:
    good, slips, unknown, values = found["options"]["told"]
    path = "ConfigInvalid: spec.grpo.rollout.server.args"

    assert good == []
    assert slips == [
        f"{path}.max-num-seq: vLLM 0.31.0+cpu has no such option: did you mean max-num-seqs?",
        f"{path}.seed: vLLM cannot read \"one\": invalid int value: 'one'",
    ]
    assert unknown[0].startswith(
        f"{path}.kv-cache-dtype: vLLM cannot read \"fp9\": invalid choice: 'fp9' (choose from "
    )
    assert unknown[1:] == [  # argparse would take the first for tensor-parallel-size, which is posttrain's
        f"{path}.tensor-parallel: vLLM 0.31.0+cpu has no such option: did you mean tensor-parallel-size?",
        f"{path}.weather: vLLM 0.31.0+cpu has no such option: `vllm serve --help=all` in its image lists them",
    ]
    assert values[0] == (
        f'{path}.enable-prefix-caching: the option takes no value, and has "yes": write true, or '
        "no-enable-prefix-caching to turn it off"
    )
    assert "Invalid compilation mode: quick. Valid modes are: NONE," in values[1]
    assert found["options"]["missing"] == []


def test_every_server_answers_as_the_model_does_after_each_hand_over(found: dict[str, Any]) -> None:
    rounds = found["hand_over"]

    assert [(r["before"], r["after"]) for r in rounds] == [([False, False], [True, True])] * 2
    versions = [r["version"].partition("-") for r in rounds]
    assert [number for _, _, number in versions] == ["1", "2"]
    assert len({trainer for trainer, _, _ in versions}) == 1


def test_the_copies_of_a_server_share_the_prompts(found: dict[str, Any]) -> None:
    assert found["copies"] == ["0", "1"]


def test_the_copies_of_a_server_do_not_draw_the_same_numbers(found: dict[str, Any]) -> None:
    one, other = found["alike"]
    assert one != other


def test_a_server_gets_whole_weights_of_ranks_that_have_halves_of_them(found: dict[str, Any]) -> None:
    assert found["shards"] == {"halves": True, "before": [False], "after": [True]}


def test_a_server_that_computes_with_packed_copies_does_not_and_nothing_is_raised(found: dict[str, Any]) -> None:
    assert found["packed"][0]["after"] == [True, False]


def test_prompts_are_spread_over_the_servers_and_each_completion_knows_server_and_version(
    found: dict[str, Any],
) -> None:
    first, second = found["servers"]

    assert found["spread"] == {
        "prompts": True,
        "completions": True,
        "logprobs": [12] * 10,
        "servers": [url for url in (first, second, first, second, first) for _ in range(2)],
        "versions": [True],
    }


def test_grpo_trains_with_two_servers_whose_log_probabilities_are_its_own(found: dict[str, Any]) -> None:
    trained = found["train"]

    assert trained["stopped"] is None
    assert len(trained["differences"]) == 3
    assert max(trained["differences"]) < 1e-5
    assert (trained["before"], trained["after"]) == ([False, False], [True, True])


def test_a_server_that_acknowledges_weights_and_drops_them_stops_the_training(found: dict[str, Any]) -> None:
    trained = found["train_dropped"]
    _, second = found["servers"]

    assert trained["stopped"].startswith(
        f"at step 2 the log-probabilities of the completions differ from the trainer's in those of {second} (by "
    )
    assert ", and not in those of the other rollout servers (1); rounding explains 0.0003" in trained["stopped"]
    assert [difference < 1e-5 for difference in trained["differences"]] == [True]  # step 2 is not trained


def test_what_nccl_sends_of_a_model_with_an_adapter_is_the_merged_model(found: dict[str, Any]) -> None:
    packed = found["pack"]

    assert all(packed["copied"])
    # TRL and vLLM alone send the adapted layers without their adapters: two of each of the model's two layers.
    assert packed["plain"].count(False) == 4


def test_a_server_that_died_gets_no_prompts_and_joins_again_when_it_was_restarted(found: dict[str, Any]) -> None:
    first, _ = found["servers"]

    assert found["rejoin"] == {"completions": True, "servers": [first], "after": [True, True]}


def test_an_error_names_the_server_and_its_likely_cause(found: dict[str, Any]) -> None:
    first, _ = found["servers"]
    told = found["refuse"]

    assert told["closed"].startswith(
        "ServerLost: the rollout server http://127.0.0.1:9 cannot be reached (GET /health): it has ended, or has not "
    )
    assert told["twice"] == (f"RolloutError: a rollout server is named twice in {first},{first}/: name each once")
    assert told["backend"] == (
        f"the rollout server {first} takes weights by gloo, and the trainer on cuda sends them by nccl: start it with "
        """--weight-transfer-config '{"backend": "nccl"}'"""
    )


def test_grpo_trains_with_the_engine_inside_it(found: dict[str, Any], colocated: Process) -> None:
    trained = colocated.answers()["colocate"]

    assert trained["stopped"] is None
    assert max(trained["differences"]) < 1e-5
    assert (trained["before"], trained["after"]) == ([False], [True])
