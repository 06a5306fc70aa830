"""What the objects of a run need of this machine: environments for their images, and GPUs.

It owns how a pod's image names an environment and how GPUs are counted; it must not make an environment, nor know why
a run has those objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from posttrain.errors import Problem, UserError
from posttrain.local.machine import Machine
from posttrain.plan.types import Manifest
from posttrain.settings import Images


def image_repository(image: str) -> str:
    """Return an image without tag and digest: what it is called in every version."""
    name, colon, tag = image.partition("@")[0].rpartition(":")
    return name if colon and "/" not in tag else image.partition("@")[0]


def environments_by_image(images: Images) -> dict[str, str]:
    """Return by the repository of each image in the settings the environment that stands for it."""
    return {image_repository(image): name for name, image in images.model_dump().items()}


def needed_environments(objects: Iterable[Manifest], *, images: Images) -> tuple[str, ...]:
    """Return the environments that the pods of these objects run in.

    Raises:
        UserError: a pod has an image that is none of the settings'.
    """
    known = environments_by_image(images)
    needed = {
        image_repository(str(container["image"]))
        for manifest in objects
        for _, template in _templates(manifest)
        for container in template["spec"]["containers"]
    }
    for image in sorted(needed - known.keys()):
        raise UserError(f"no environment of this machine stands for the image {image}: take one of {', '.join(known)}")
    return tuple(sorted(known[image] for image in needed))


def count_gpus(pod: Mapping[str, Any], *, resource: str) -> int:
    """Return how many GPUs a pod, or a pod template, asks for."""
    limits = (container.get("resources", {}).get("limits", {}) for container in pod["spec"]["containers"])
    return sum(int(amounts.get(resource, 0)) for amounts in limits)


def find_gpu_problems(objects: Iterable[Manifest], *, machine: Machine, resource: str) -> Iterator[Problem]:
    """Yield that everything of a run together asks for more GPUs than there are, where no part of it does alone."""
    asked = {
        f"{manifest['kind']} {manifest['metadata']['name']}": number
        for manifest in objects
        if (number := sum(count * count_gpus(template, resource=resource) for count, template in _templates(manifest)))
    }
    total, there = sum(asked.values()), len(machine.gpus)
    if total > there and len(asked) > 1:
        parts = ", ".join(f"{name}: {number}" for name, number in asked.items())
        message = f"{total} GPUs asked for at the same time ({parts}), and this machine has {there}: ask for fewer"
        yield Problem(path="spec", message=message)


def _templates(manifest: Manifest) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield every pod template of an object and how many pods are made from it."""
    spec = manifest.get("spec", {})
    match manifest["kind"]:
        case "Job":
            yield 1, spec["template"]
        case "Deployment" | "StatefulSet":
            yield spec["replicas"], spec["template"]
        case "PyTorchJob":
            for replicas in spec["pytorchReplicaSpecs"].values():
                yield replicas["replicas"], replicas["template"]
