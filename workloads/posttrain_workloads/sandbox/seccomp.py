"""The filter of system calls: a BPF program from `syscalls`' lists, and the kernel's questions about new processes.

It owns the filter and how it is loaded; it must not decide what a question's answer is.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
from dataclasses import dataclass

from posttrain_workloads.sandbox import syscalls

_LOAD, _JUMP_EQUAL, _JUMP_GREATER, _JUMP_ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x54, 0x06
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_ARGUMENTS = 0, 4, 16
_ALLOW, _ERROR, _ASK, _KILL = 0x7FFF0000, 0x00050000, 0x7FC00000, 0x80000000
_REFUSE = _ERROR | errno.EPERM
_NONE_SUCH = _ERROR | errno.ENOSYS

_SET_MODE_FILTER, _NEW_LISTENER = 1, 1 << 3
_ASKED = struct.Struct("=QIIiIQ6Q")
_ANSWER = struct.Struct("=QqiI")
_IOCTL_RECEIVE, _IOCTL_SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1

_CLONE_NEW = 0x7E020080
"""Any new namespace."""
_O_ACCMODE, _O_TRUNC = 0o3, 0o1000
_F_SETOWN, _F_SETOWN_EX = 8, 15
_PR_SET_DUMPABLE = 4
_SOCK_TYPE, _SOCK_STREAM, _SOCK_SEQPACKET = 0xF, 1, 5

_libc = ctypes.CDLL(None, use_errno=True)

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, constant."""


@dataclass(frozen=True)
class FilterRules:
    """What one program's filter refuses beyond what all of them do."""

    network: bool = True
    """No socket."""
    change_mode: bool = False
    """Whether the program may change the mode of files, as a linker does."""
    own_process_only: int | None = None
    """The only process that it may send a signal to; None: the kernel sees to signals."""
    refuse_truncate: bool = False
    """Refuse to truncate what was not opened for writing: for kernels whose Landlock does not."""


def supported() -> bool:
    """Return whether the numbers of this machine's system calls are known."""
    return platform.machine() in syscalls.AUDIT_ARCHITECTURE


def build_filter(rules: FilterRules, *, machine: str) -> list[Instruction]:
    """Return the program that the kernel runs before each system call."""
    column = list(syscalls.AUDIT_ARCHITECTURE).index(machine)
    program: list[Instruction] = [
        (_LOAD, 0, 0, _OFFSET_ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, syscalls.AUDIT_ARCHITECTURE[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _OFFSET_NUMBER),
        # Beyond the newest known one, and so are the calls of x32.
        (_JUMP_GREATER, 0, 1, syscalls.NEWEST),
        (_RETURN, 0, 0, _NONE_SUCH),
    ]

    def match(name: str, *body: Instruction) -> None:
        number = syscalls.NUMBERS[name][column]
        if number >= 0:
            program.append((_JUMP_EQUAL, 0, len(body), number))
            program.extend(body)

    refused = [
        *syscalls.NAMESPACES,
        *syscalls.OTHER_PROCESSES,
        *syscalls.KERNEL,
        *syscalls.FILE_OWNERSHIP,
        *syscalls.SHARED_MEMORY,
    ]
    if rules.network:
        refused += syscalls.NETWORK
    if not rules.change_mode:
        refused += syscalls.FILE_MODE
    if rules.refuse_truncate:
        refused.append("truncate")
    for name in refused:
        match(name, (_RETURN, 0, 0, _REFUSE))
    for name in syscalls.NOT_OFFERED:
        match(name, (_RETURN, 0, 0, _NONE_SUCH))
    for name in ("fork", "vfork"):
        match(name, (_RETURN, 0, 0, _ASK))
    match(
        "clone",
        (_LOAD, 0, 0, _argument(0)),
        (_JUMP_ANY_BIT, 0, 1, _CLONE_NEW),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ASK),
    )
    # Of any other process than oneself.
    match("prlimit64", *_allow_argument(0, (0,)))
    # A datagram socket of a pair can be pointed at any other of this machine.
    match("socketpair", *_allow_argument(1, (_SOCK_STREAM, _SOCK_SEQPACKET), mask=_SOCK_TYPE))
    # What is not dumpable hides its memory and its open files from who counts them.
    match("prctl", *_refuse_argument(0, (_PR_SET_DUMPABLE,)))
    match("fcntl", *_refuse_argument(1, (_F_SETOWN, _F_SETOWN_EX)))
    if rules.own_process_only is not None:
        match("tkill", (_RETURN, 0, 0, _REFUSE))
        match("tgkill", *_allow_argument(0, (rules.own_process_only,)))
        match("kill", *_allow_argument(0, (rules.own_process_only, 0)))
    if rules.refuse_truncate:
        # With an access mode of 3 a file is open for neither, and truncated all the same.
        for name, flags in (("open", 1), ("openat", 2)):
            match(
                name,
                (_LOAD, 0, 0, _argument(flags)),
                (_AND, 0, 0, _O_ACCMODE | _O_TRUNC),
                (_JUMP_EQUAL, 2, 0, _O_TRUNC),
                (_JUMP_EQUAL, 1, 0, _O_TRUNC | _O_ACCMODE),
                (_RETURN, 0, 0, _ALLOW),
                (_RETURN, 0, 0, _REFUSE),
            )
    program.append((_RETURN, 0, 0, _ALLOW))
    return program


def _argument(index: int) -> int:
    return _OFFSET_ARGUMENTS + 8 * index


def _allow_argument(index: int, values: tuple[int, ...], *, mask: int = 0xFFFFFFFF) -> list[Instruction]:
    head = [(_LOAD, 0, 0, _argument(index)), (_AND, 0, 0, mask)]
    tests = [(_JUMP_EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
    return [*head, *tests, (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]


def _refuse_argument(index: int, values: tuple[int, ...]) -> list[Instruction]:
    tests = [(_JUMP_EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
    return [(_LOAD, 0, 0, _argument(index)), *tests, (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def load_filter(rules: FilterRules) -> int:
    """Put the filter before this thread and what it starts; return the descriptor that the kernel's questions come on.

    PR_SET_NO_NEW_PRIVS must be set.

    Raises:
        OSError: the kernel refused.
    """
    machine = platform.machine()
    program = build_filter(rules, machine=machine)
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    loaded = _Program(len(program), packed)
    number = syscalls.NUMBERS["seccomp"][list(syscalls.AUDIT_ARCHITECTURE).index(machine)]
    descriptor = int(
        _libc.syscall(number, ctypes.c_uint(_SET_MODE_FILTER), ctypes.c_uint(_NEW_LISTENER), ctypes.byref(loaded))
    )
    if descriptor < 0:
        number_of_error = ctypes.get_errno()
        raise OSError(number_of_error, f"seccomp: {os.strerror(number_of_error)}")
    return descriptor


def receive_question(listener: int) -> tuple[int, int] | None:
    """Return the id of a question and the thread that asks for a new process; None if it has gone meanwhile."""
    buffer = bytearray(_ASKED.size)
    try:
        fcntl.ioctl(listener, _IOCTL_RECEIVE, buffer)
    except (FileNotFoundError, InterruptedError):
        return None
    fields = _ASKED.unpack(buffer)
    return fields[0], fields[1]


def answer_question(listener: int, question: int, *, allow: bool) -> None:
    """Let a new process be, or have its parent see EAGAIN, as at the end of what a user may have."""
    error, flags = (0, _CONTINUE) if allow else (-errno.EAGAIN, 0)
    try:
        fcntl.ioctl(listener, _IOCTL_SEND, bytearray(_ANSWER.pack(question, 0, error, flags)))
    except FileNotFoundError:
        return  # who asked was killed meanwhile
