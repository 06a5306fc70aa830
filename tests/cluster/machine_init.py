"""Process 1 of a machine that is a set of namespaces: `python -I -S machine_init.py COMMANDS READY`.

It owns the machine's mounts, which COMMANDS (JSON) make, and reaping; it must not import anything but the standard
library. It ends on SIGTERM, and with it the kernel ends everything in its PID namespace.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path


def main() -> int:
    """Run the commands, say that they are done, and reap orphans."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})
    for command in json.loads(sys.argv[1]):
        subprocess.run(command, check=True)
    Path(sys.argv[2]).touch()
    while signal.sigwait({signal.SIGCHLD, signal.SIGTERM}) != signal.SIGTERM:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
