"""What a run's objects need of a machine: environments by their images, and GPUs."""

from __future__ import annotations

import pytest

from posttrain.errors import UserError
from posttrain.local.machine import Gpu, Machine
from posttrain.local.needs import find_gpu_problems, image_repository, needed_environments
from posttrain.plan.types import Manifest
from posttrain.settings import Images
from tests.support.local_cluster import build_batch_job, build_job, build_service

RESOURCE = "nvidia.com/gpu"


def ask(gpus: int) -> dict[str, dict[str, dict[str, str]]]:
    return {"resources": {"limits": {RESOURCE: str(gpus)}}}


def build_machine(gpus: int) -> Machine:
    found = tuple(Gpu(device=f"GPU-{index}", name="L4", memory_mib=None) for index in range(gpus))
    return Machine(name="box", cpus=1, memory_bytes=1, gpus=found)


@pytest.mark.parametrize(
    ("image", "repository"),
    [
        ("registry.example:5000/a/trainer:0.1.0", "registry.example:5000/a/trainer"),
        ("registry.example:5000/a/trainer", "registry.example:5000/a/trainer"),
        ("a/trainer@sha256:12ab", "a/trainer"),
        ("a/trainer:1@sha256:12ab", "a/trainer"),
        ("", ""),
    ],
)
def test_an_image_is_called_the_same_in_every_version(image: str, repository: str) -> None:
    assert image_repository(image) == repository


def test_the_settings_say_which_environment_stands_for_an_image_of_whatever_version() -> None:
    images = Images(trainer="registry/one:2")
    job, batch_job = build_job("pass", image="registry/one:1"), build_batch_job("pass")
    batch_job["spec"]["template"]["spec"]["containers"][0]["image"] = "registry/one:2"

    assert needed_environments([job, batch_job, *build_service("x", image="registry/one:1")], images=images) == (
        "trainer",
    )
    with pytest.raises(UserError, match="the image registry/other: take one of"):
        needed_environments([build_job("pass", image="registry/other:1")], images=images)


def test_what_asks_for_gpus_at_the_same_time_must_find_them_all() -> None:
    objects: list[Manifest] = [
        build_job("pass", **ask(1)),
        *build_service("demo-server", kind="StatefulSet", replicas=2, **ask(1)),
    ]

    def problems(gpus: int) -> list[str]:
        return [str(problem) for problem in find_gpu_problems(objects, machine=build_machine(gpus), resource=RESOURCE)]

    assert problems(3) == []
    assert problems(2) == [
        "spec: 3 GPUs asked for at the same time (PyTorchJob demo-a1: 1, StatefulSet demo-server: 2), and this machine "
        "has 2: ask for fewer"
    ]
