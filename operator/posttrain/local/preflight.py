"""What of a run this machine cannot do, found before anything is written.

It owns the look at the files, claims, secrets and GPUs that a spec names; it must not look into any of them: what is in
a model or a dataset is prepare's.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.api.training_run import TrainingRunSpec
from posttrain.errors import Problem, UserError
from posttrain.local.machine import Machine
from posttrain.plan.sources import NamedSource, named_sources

_FILE = "file://"
_PVC = "pvc://"
_CONFIG_MAP_MAX_BYTES = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the command line and the file say besides the resource."""

    claims: Mapping[str, Path]
    secrets: Mapping[str, Path]
    config_maps: Mapping[str, Mapping[str, str]]


def resolve_paths(data: Mapping[str, Any], *, folder: Path) -> dict[str, Any]:
    """Return the resource with every relative path made absolute: they are relative to the folder of its file."""
    resolved = copy.deepcopy(dict(data))
    spec = resolved.get("spec")
    if not isinstance(spec, dict):
        return resolved
    for part in _parts(spec):
        source = part.get("source")
        if isinstance(source, str) and source.startswith(_FILE):
            part["source"] = _FILE + _absolute(source.removeprefix(_FILE), folder=folder)
    code = spec.get("code")
    if isinstance(code, dict) and isinstance(code.get("path"), str):
        code["path"] = _absolute(code["path"], folder=folder)
    return resolved


def _parts(spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every part of an unchecked spec that may have a source."""
    members = [spec.get("model")]
    for name in ("datasets", "evalDatasets"):
        group = spec.get(name)
        members += group if isinstance(group, list) else []
    yield from (member for member in members if isinstance(member, dict))


def _absolute(path: str, *, folder: Path) -> str:
    return os.path.normpath(folder / path)


def find_local_problems(spec: TrainingRunSpec, *, machine: Machine, given: Given) -> list[Problem]:
    """Return everything about a valid spec that this machine cannot serve, each with what to change."""
    return [
        *_files(spec),
        *_claims(spec, given=given),
        *_secrets(spec, given=given),
        *_code(spec, given=given),
        *_gpus(spec, machine=machine),
        *_image(spec),
        *_sandbox(spec, machine=machine),
    ]


def _files(spec: TrainingRunSpec) -> Iterator[Problem]:
    for named in named_sources(spec):
        if named.source.startswith(_FILE):
            yield from _path_problems(named, Path(named.source.removeprefix(_FILE)))


def _path_problems(named: NamedSource, path: Path) -> Iterator[Problem]:
    where = f"{named.path}.source"
    if not path.exists():
        message = f"there is no {path}: correct the path (a relative one starts at the folder of the resource's file)"
        yield Problem(path=where, message=message)
    elif not os.access(path, os.R_OK):
        yield Problem(path=where, message=f"{path} cannot be read: change its permissions")
    elif named.key == "model" and not path.is_dir():
        yield Problem(path=where, message=f"{path} is a file: name the folder with the model's config.json")


def _claims(spec: TrainingRunSpec, *, given: Given) -> Iterator[Problem]:
    used = [
        (f"{named.path}.source", *named.source.removeprefix(_PVC).partition("/")[::2], named)
        for named in named_sources(spec)
        if named.source.startswith(_PVC)
    ]
    for where, claim, path, named in used:
        folder = given.claims.get(claim)
        missing = _claim_problem(claim, folder=folder, where=where)
        if missing is not None:
            yield missing
        elif folder is not None:
            yield from _path_problems(named, folder / path)
    storage = spec.checkpoints.storage.claim_name
    if storage is not None:
        where = "spec.checkpoints.storage.claimName"
        folder = given.claims.get(storage)
        missing = _claim_problem(storage, folder=folder, where=where)
        if missing is not None:
            yield missing
        elif folder is not None and not os.access(folder, os.W_OK | os.X_OK):
            yield Problem(path=where, message=f"{folder} cannot be written to: change its permissions, or take another")


def _claim_problem(claim: str, *, folder: Path | None, where: str) -> Problem | None:
    if folder is None:
        message = f"claim {claim} is a volume of a cluster: say which folder stands for it, --claim {claim}=FOLDER"
        return Problem(path=where, message=message)
    if not folder.is_dir():
        return Problem(path=where, message=f"--claim {claim}={folder}: there is no such folder")
    return None


def _secrets(spec: TrainingRunSpec, *, given: Given) -> Iterator[Problem]:
    for where, name, key in _used_secrets(spec):
        folder = given.secrets.get(name)
        if folder is None:
            message = (
                f"Secret {name} is an object of a cluster: say which folder stands for it, --secret {name}=FOLDER, "
                f"with a file {key or 'for each key'} in it"
            )
            yield Problem(path=where, message=message)
        elif not folder.is_dir():
            yield Problem(path=where, message=f"--secret {name}={folder}: there is no such folder")
        elif key is not None and not (folder / key).is_file():
            yield Problem(path=where, message=f"--secret {name}={folder}: there is no file {key} in that folder")


def _used_secrets(spec: TrainingRunSpec) -> Iterator[tuple[str, str, str | None]]:
    """Yield (where, name, key) for each Secret that becomes environment; without a key, all of them do."""
    token = spec.access.hub_token_secret_ref
    if token is not None:
        yield "spec.access.hubTokenSecretRef", token.name, token.key
    sandbox = spec.used_sandbox
    if sandbox is not None and sandbox.api_key_secret_ref is not None:
        key = sandbox.api_key_secret_ref
        yield "spec.grpo.sandbox.apiKeySecretRef", key.name, key.key
    if spec.tracking.secret_ref is not None:
        yield "spec.tracking.secretRef", spec.tracking.secret_ref, None
    for i, name in enumerate((spec.pod_overrides and spec.pod_overrides.env_from_secrets) or ()):
        yield f"spec.podOverrides.envFromSecrets[{i}]", name, None


def read_secrets(secrets: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Return the data of the Secrets that folders stand for: a file a key, as where a cluster mounts one."""
    # A file that was written by an editor or by `echo` ends in a line break that is none of the secret's.
    return {
        name: {
            file.name: file.read_text().removesuffix("\n")
            for file in sorted(folder.iterdir())
            if file.is_file() and not file.name.startswith(".")
        }
        for name, folder in secrets.items()
        if folder.is_dir()
    }


def _code(spec: TrainingRunSpec, *, given: Given) -> Iterator[Problem]:
    if spec.code is None:
        return
    if spec.code.path is not None:
        try:
            read_code(Path(spec.code.path))
        except UserError as error:
            yield Problem(path="spec.code.path", message=str(error))
    elif spec.code.config_map_name not in given.config_maps:
        message = (
            f"ConfigMap {spec.code.config_map_name} is an object of a cluster: put it into the same file as another "
            "document, or say where the code lies, --set 'spec.code={path: FOLDER}'"
        )
        yield Problem(path="spec.code.configMapName", message=message)


def read_code(folder: Path) -> dict[str, str]:
    """Return the files of own code by their path in the folder, as a ConfigMap could hold them.

    Hidden files and Python's caches are passed over.

    Raises:
        UserError: it is no folder, has something that is no text, or is too large for a ConfigMap.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: correct the path (a relative one starts at the resource's file)")
    files = {}
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        if file.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in path.parts):
            try:
                files[path.as_posix()] = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{file} is no text: keep only Python and other text files in {folder}") from None
    size = sum(len(text.encode()) for text in files.values())
    if size > _CONFIG_MAP_MAX_BYTES:
        raise UserError(f"{folder} has {size} bytes, and code may have {_CONFIG_MAP_MAX_BYTES}: keep data elsewhere")
    return files


def _gpus(spec: TrainingRunSpec, *, machine: Machine) -> Iterator[Problem]:
    resources, count = spec.resources, len(machine.gpus)
    has = "no GPU" if count == 0 else f"{count} GPU{'' if count == 1 else 's'}"
    if resources.gpus_per_node > count:
        fewer = f"--set spec.resources.gpusPerNode={count}, or " if count else ""
        message = (
            f"{resources.gpus_per_node} asked for, and this machine has {has}: add {fewer}"
            "--set spec.resources.gpusPerNode=0, which trains on its CPUs"
        )
        yield Problem(path="spec.resources.gpusPerNode", message=message)
    elif resources.num_nodes > 1 and resources.gpus_per_node > 0:
        message = (
            f"{resources.num_nodes} nodes with GPUs asked for, and this machine is one: add --set "
            "spec.resources.numNodes=1, or --set spec.resources.gpusPerNode=0 to try the nodes out on its CPUs"
        )
        yield Problem(path="spec.resources.numNodes", message=message)
    elif spec.gpus > count:
        message = (
            f"the gang and its rollout servers have {spec.gpus} GPUs together, and this machine has {has}: lower "
            "spec.resources.gpusPerNode, or spec.grpo.rollout.server.replicas or gpusPerNode, or add --set "
            "'spec.grpo.rollout={mode: Colocate}'"
        )
        yield Problem(path="spec.grpo.rollout.server", message=message)


def _image(spec: TrainingRunSpec) -> Iterator[Problem]:
    if spec.pod_overrides is not None and spec.pod_overrides.image is not None:
        message = (
            "a local run has no containers, only the environment of posttrain's own trainer image: add "
            "--set spec.podOverrides.image="
        )
        yield Problem(path="spec.podOverrides.image", message=message)


def _sandbox(spec: TrainingRunSpec, *, machine: Machine) -> Iterator[Problem]:
    if spec.own_sandbox is None or machine.system == "Linux" or spec.prepare.dry_run:
        return
    system = "macOS" if machine.system == "Darwin" else machine.system
    message = (
        f"the walls of posttrain's own sandbox are Linux's, and this is {system}: run it on Linux, or name a Piston "
        "of your own, --set 'spec.grpo.sandbox={mode: Piston, endpoints: [http://HOST:2000]}' (docs/sandbox.md)"
    )
    yield Problem(path="spec.grpo.sandbox", message=message)
