"""What a machine has, and how that becomes settings."""

from __future__ import annotations

import pytest

from posttrain.local.machine import Gpu, Machine, local_settings, observe_machine, parse_gpus, visible_gpus

A = Gpu(device="GPU-aaaa", name="NVIDIA H200", memory_mib=143771)
B = Gpu(device="GPU-bbbb", name="NVIDIA H200", memory_mib=143771)
MACHINE = Machine(name="box", cpus=16, memory_bytes=2**35, gpus=(A, B))


def test_this_machine_has_cpus_and_memory() -> None:
    machine = observe_machine()

    assert machine.cpus >= 1
    assert machine.memory_bytes > 2**28


def test_the_listing_of_nvidia_smi_is_read_also_where_memory_is_shared_with_the_machine() -> None:
    listing = "GPU-aaaa, NVIDIA H200, 143771\nGPU-cccc, NVIDIA GB10, [N/A]\n"

    assert parse_gpus(listing) == (A, Gpu(device="GPU-cccc", name="NVIDIA GB10", memory_mib=None))


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, (A, B)),
        ("", ()),
        ("1", (B,)),
        ("1,0", (B, A)),
        ("GPU-b", (B,)),
        ("-1", ()),
        ("0,7,1", (A,)),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(visible: str | None, expected: tuple[Gpu, ...]) -> None:
    assert visible_gpus((A, B), visible=visible) == expected


def test_settings_describe_the_machine_under_every_profile_that_a_run_may_name() -> None:
    settings = local_settings(MACHINE, profile="h100", num_nodes=2)

    assert settings.profiles["h100"] == settings.profiles["default"]
    profile = settings.profiles["default"]
    assert (profile.cpu, profile.gpu_name, profile.gpu_memory) == ("8", "NVIDIA H200", "143771Mi")
    assert settings.allow_file_sources


def test_a_machine_without_gpus_says_nothing_of_their_memory() -> None:
    machine = Machine(name="laptop", cpus=1, memory_bytes=2**30, gpus=())

    profile = local_settings(machine, num_nodes=4).profiles["default"]

    assert (profile.cpu, profile.gpu_name, profile.gpu_memory) == ("1", None, None)
