"""What the server asks a guard to do, and what it gets back: the values that travel between the two processes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Walls:
    """The walls that a test can take away to see what they hold; the server builds all of them."""

    files: bool = True
    """Landlock: paths, TCP, signals."""
    network: bool = True
    """No sockets."""
    environment: bool = True
    """A program's environment is not ours."""
    landlock_abi: int | None = None
    """Use Landlock as on a kernel of this ABI, and what then stands in for the rest; None: the kernel's own."""


@dataclass(frozen=True)
class Limits:
    """What a stage may take, all its processes together where nothing else is said."""

    wall_seconds: float
    cpu_seconds: float
    memory_bytes: int
    output_bytes: int
    """Of standard output, and of standard error."""
    file_bytes: int
    """Of one file."""
    scratch_bytes: int
    """Of all files."""
    processes: int
    """Processes and threads that live at the same time."""


@dataclass(frozen=True)
class Stage:
    """One program to run in the scratch folder: a compiler, or what was sent."""

    argv: tuple[str, ...]
    limits: Limits
    stdin: bytes = b""
    stack_bytes: int = 16 << 20
    change_mode: bool = False
    """Whether it may make files executable."""


@dataclass(frozen=True)
class Job:
    """The files of a request and what is done with them, in this order, up to the first stage that fails."""

    scratch: str
    """An empty folder that is this job's alone; it is removed in the end."""
    files: tuple[tuple[str, bytes], ...]
    stages: tuple[Stage, ...]
    readable: tuple[str, ...]
    """Paths that the programs may read and execute."""
    environment: dict[str, str] = field(default_factory=dict)
    walls: Walls = Walls()


@dataclass(frozen=True)
class StageResult:
    """What a stage did. Either `code` or `signal` is set, or, where `status` is XX, neither."""

    stdout: bytes = b""
    stderr: bytes = b""
    output: bytes = b""
    """Both, in the order in which they came."""
    code: int | None = None
    signal: str | None = None
    status: str | None = None
    """Piston's: RE exit code, SG signal, TO time, OL and EL output, XX the sandbox's own failure; None: all is well."""
    message: str | None = None
    memory_bytes: int | None = None
    """The most that was resident."""
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
