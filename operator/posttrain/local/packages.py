"""The folder from which an image's interpreter imports posttrain: links to the packages and to their distribution.

It owns what lies in that folder; it must not hold anything else that this interpreter has installed.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from posttrain.errors import UserError

_PACKAGES = ("posttrain", "posttrain_workloads")


def link_packages(folder: Path) -> None:
    """Make the folder and its links, also where others were. With it on PYTHONPATH posttrain is as good as installed.

    The distribution is there for its entry points: vLLM finds its plugins by them.

    Raises:
        UserError: posttrain is not installed here.
    """
    folder.mkdir(exist_ok=True)
    for package in _PACKAGES:
        # The folder that holds them may hold this interpreter's other packages too, which are not the environment's.
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"the package {package} is not installed beside posttrain: install posttrain again")
        point(folder / package, Path(spec.submodule_search_locations[0]))
    for outdated in folder.glob("posttrain-*.dist-info"):
        outdated.unlink()
    info = _distribution_folder()
    point(folder / info.name, info)


def point(link: Path, target: Path) -> None:
    """Make a link, or let it point there from now on."""
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _distribution_folder() -> Path:
    try:
        found = distribution("posttrain")
    except PackageNotFoundError:
        raise UserError("posttrain is imported here, but not installed: install it, and run its command") from None
    info = Path(str(found.locate_file(f"posttrain-{found.version}.dist-info")))
    if not info.is_dir():
        raise UserError(f"the installation of posttrain has no {info}: install posttrain again")
    return info
