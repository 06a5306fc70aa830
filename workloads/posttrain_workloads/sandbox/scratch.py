"""A job's folder: its files are laid into it, it is measured while programs write there, and it is removed.

It owns that nothing a program leaves there leads elsewhere: no link is followed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from posttrain_workloads.sandbox.job import Job
from posttrain_workloads.sandbox.walls import box, temporary

MAX_FILES = 4096


class ScratchNotRemovedError(Exception):
    """Files are left after they were removed."""


def lay_out(job: Job) -> None:
    """Make the folder with the job's files; their names were checked."""
    for folder in (job.scratch, box(job.scratch), temporary(job.scratch)):
        Path(folder).mkdir(mode=0o700)
    for name, content in job.files:
        file = Path(box(job.scratch), name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def exceeds(scratch: str, *, max_bytes: int) -> bool:
    """Return whether the files are more than allowed, by their blocks or by their number, or lie too deep to count."""
    total, count = 0, 0
    pending = [scratch]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    count += 1
                    try:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
                    except FileNotFoundError:
                        continue
                    if count > MAX_FILES or total > max_bytes:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except OSError:
            return True  # ENAMETOOLONG
    return False


def remove(scratch: str) -> None:
    """Remove the folder, whatever programs made of it; none of them may live any more.

    Raises:
        ScratchNotRemovedError: something is left.
    """
    try:
        shutil.rmtree(scratch)
    except FileNotFoundError:
        return
    except (OSError, RecursionError):
        # Folders without rights, or deeper than Python goes. Neither program follows links.
        subprocess.run(["chmod", "-R", "u+rwX", scratch], check=False, capture_output=True)
        done = subprocess.run(["rm", "-rf", "--one-file-system", scratch], check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise ScratchNotRemovedError(f"{scratch} cannot be removed: {done.stderr.strip()[-300:]}") from None
