"""The volumes of a pod as folders of this machine.

It owns what each kind of volume becomes; it must not know which pods there are.
"""

from __future__ import annotations

import base64
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from posttrain.plan.types import Manifest

TERMINATION_FILE = "termination-log"


def make_volumes(
    pod: Manifest,
    *,
    folder: Path,
    claim: Callable[[str], Path],
    config_map: Callable[[str], Manifest],
    token: str | None,
) -> dict[str, Path]:
    """Make a pod's volumes below `folder`, and return what lies where each mountPath of its container points to."""
    container = pod["spec"]["containers"][0]
    volumes: dict[str, Path] = {}
    for volume in pod["spec"].get("volumes", ()):
        place = folder / "volumes" / volume["name"]
        if "persistentVolumeClaim" in volume:
            place = claim(volume["persistentVolumeClaim"]["claimName"])
        elif "hostPath" in volume:
            place = Path(volume["hostPath"]["path"])
        elif "configMap" in volume:
            _project(volume["configMap"], config_map(volume["configMap"]["name"]), place=place)
        elif "projected" in volume:
            assert token is not None, "only pods of an attempt report"
            _project_access(volume["projected"], token=token, place=place)
        elif "emptyDir" in volume:
            place.mkdir(parents=True)
        else:
            raise ValueError(f"no plan has a volume of the kind of {volume}")
        volumes[volume["name"]] = place
    termination = folder / TERMINATION_FILE
    termination.touch()
    roots = {mount["mountPath"]: _mounted(mount, volumes=volumes) for mount in container.get("volumeMounts", ())}
    return {**roots, container.get("terminationMessagePath", "/dev/termination-log"): termination}


def _mounted(mount: Mapping[str, Any], *, volumes: Mapping[str, Path]) -> Path:
    place = volumes[mount["name"]]
    if "subPath" in mount:
        place /= mount["subPath"]
        place.mkdir(parents=True, exist_ok=True)
    return place


def _project(volume: Mapping[str, Any], manifest: Manifest, *, place: Path) -> None:
    content = {key: text.encode() for key, text in manifest.get("data", {}).items()}
    content |= {key: base64.b64decode(text) for key, text in manifest.get("binaryData", {}).items()}
    paths = {item["key"]: item["path"] for item in volume["items"]} if "items" in volume else {k: k for k in content}
    place.mkdir(parents=True)
    for key, path in paths.items():
        file = place / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content[key])


def _project_access(volume: Mapping[str, Any], *, token: str, place: Path) -> None:
    place.mkdir(parents=True)
    for source in volume["sources"]:
        if "serviceAccountToken" in source:
            file = place / source["serviceAccountToken"]["path"]
            file.touch(mode=0o600)
            file.write_text(token)
        else:
            # The server speaks plain HTTP to this machine alone. A client that loads its authority before it looks at
            # the address needs one that can be loaded.
            authorities = ssl.get_default_verify_paths().cafile
            text = Path(authorities).read_text() if authorities else ""
            for item in source["configMap"]["items"]:
                (place / item["path"]).write_text(text)
