"""Landlock: what a program may open, by paths. The three system calls, for the kernel's ABI 1 and newer.

It owns the rules' bits; which paths are open is the caller's choice. There is no well-kept package for it on PyPI, and
glibc has no wrappers.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG = 1
_RULE_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (1 << bit for bit in range(6))
_MAKE_DIR, _MAKE_REG, _MAKE_FIFO, _MAKE_SYM = 1 << 7, 1 << 8, 1 << 10, 1 << 12
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_OF_A_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV

READ = _EXECUTE | _READ_FILE | _READ_DIR
"""Read and run what lies there."""
WRITE_DEVICE = _READ_FILE | _WRITE_FILE | _TRUNCATE
"""Read and write one file, as /dev/null."""
OWN = (
    READ
    | _WRITE_FILE
    | _REMOVE_DIR
    | _REMOVE_FILE
    | _MAKE_DIR
    | _MAKE_REG
    | _MAKE_FIFO
    | _MAKE_SYM
    | _REFER
    | _TRUNCATE
)
"""Everything but devices and sockets."""

TRUNCATE_ABI = 3
"""From here on the kernel sees to truncation."""
SIGNAL_ABI = 6
"""From here on the kernel keeps signals within a program's own processes."""

# By ABI: all rights to files that the kernel knows; TCP to bind and to connect to; signals and abstract sockets.
_HANDLED_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_HANDLED_TCP = 0b11
_SCOPED = 0b11

_libc = ctypes.CDLL(None, use_errno=True)


def abi_version() -> int:
    """Return the kernel's Landlock ABI; 0 where it has none, or a seccomp profile around us refuses it."""
    version = int(_libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(_VERSION_FLAG)))
    return max(version, 0)


def restrict(paths: Iterable[tuple[str, int]], *, abi: int) -> None:
    """Close every path to this thread and what it starts, but for those given with their rights; TCP and signals too.

    A path that does not exist is left out. There is no way back. PR_SET_NO_NEW_PRIVS must be set.

    Raises:
        OSError: the kernel refused.
    """
    handled = _HANDLED_FILES[min(abi, 5)]
    attributes = struct.pack("Q", handled)
    if abi >= 4:
        attributes += struct.pack("Q", _HANDLED_TCP)
    if abi >= SIGNAL_ABI:
        attributes += struct.pack("Q", _SCOPED)
    ruleset = _call(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    try:
        for path, rights in paths:
            _open_path(ruleset, path, rights & handled)
        _call(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint(0))
    finally:
        os.close(ruleset)


def _open_path(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return
    try:
        if not os.path.isdir(path):  # noqa: PTH112
            rights &= _OF_A_FILE
        rule = struct.pack("=Qi", rights, fd)
        _call(_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_RULE_PATH_BENEATH), rule, ctypes.c_uint(0))
    finally:
        os.close(fd)


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        number_of_error = ctypes.get_errno()
        raise OSError(number_of_error, f"Landlock: {os.strerror(number_of_error)}")
    return result
