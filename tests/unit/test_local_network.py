"""Cluster addresses in a pod's variables as addresses of this machine."""

from __future__ import annotations

import pytest

from posttrain.local.network import Network
from posttrain.plan.types import Manifest

SERVICES: list[Manifest] = [
    {"metadata": {"name": "demo-sandbox"}, "spec": {"selector": {"role": "sandbox"}}},
    {"metadata": {"name": "demo-server"}, "spec": {"selector": {"role": "server"}, "clusterIP": "None"}},
]


@pytest.fixture
def network() -> Network:
    return Network(lambda: SERVICES)


def build_pod(name: str, *, role: str) -> Manifest:
    return {"metadata": {"name": name, "labels": {"role": role, "more": "x"}}}


def test_a_service_has_one_port_that_its_pod_listens_on_and_others_reach_it_by(network: Network) -> None:
    port = network.port_of(build_pod("demo-sandbox-0", role="sandbox"), 2000)

    assert network.listen(build_pod("demo-sandbox-0", role="sandbox"), "0.0.0.0:2000") == f"127.0.0.1:{port}"
    assert network.localize("http://demo-sandbox:2000/api") == f"http://127.0.0.1:{port}/api"


def test_each_pod_of_a_headless_service_has_a_port_of_its_own_also_in_a_list(network: Network) -> None:
    ports = [network.port_of(build_pod(f"demo-server-{index}", role="server"), 8000) for index in range(2)]

    found = network.localize("http://demo-server-0.demo-server:8000,http://demo-server-1.demo-server:8000")

    assert found == f"http://127.0.0.1:{ports[0]},http://127.0.0.1:{ports[1]}"
    assert len(set(ports)) == 2


@pytest.mark.parametrize(
    "address",
    [
        "http://piston.tools:2000",
        "http://demo-sandbox-2:2000",
        "http://demo-sandbox.tools:2000",
        "http://demo-server:8000",
        "http://10.0.0.7:2000",
        "demo-sandbox",
    ],
)
def test_what_is_no_address_of_the_runs_services_stays(network: Network, address: str) -> None:
    assert network.localize(address) == address


def test_a_pod_that_serves_without_a_service_is_no_plans(network: Network) -> None:
    with pytest.raises(ValueError, match="without a Service, as demo-x-0"):
        network.port_of(build_pod("demo-x-0", role="x"), 1)
