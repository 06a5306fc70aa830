"""The distribution's version; nothing else may be imported or defined here, because every container imports it."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("posttrain")
except PackageNotFoundError:  # run from a source tree put on PYTHONPATH
    __version__ = "0+source"
