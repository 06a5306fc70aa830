"""What the operator writes to standard error: one JSON object a line, whoever logs."""

from __future__ import annotations

import json
import subprocess
import sys

_LOGGING = """
import logging
import structlog
from posttrain.control.logs import configure_logs

configure_logs(level="info")
log = structlog.get_logger("posttrain.control.reconciler")
log.info("created", kind="PyTorchJob", name="demo-a1")
log.debug("not told")
logging.getLogger("kopf.objects").info("not told either")
logging.getLogger("aiohttp").warning("said by %s", "a library")
try:
    {}["missing"]
except KeyError:
    log.exception("failed", run="team/demo")
"""


def test_every_line_is_one_json_object_with_its_time_level_and_fields() -> None:
    done = subprocess.run([sys.executable, "-c", _LOGGING], capture_output=True, text=True, check=True)

    created, library, failed = map(json.loads, done.stderr.splitlines())
    assert created.pop("timestamp").endswith("Z")
    assert created == {
        "event": "created",
        "kind": "PyTorchJob",
        "name": "demo-a1",
        "level": "info",
        "logger": "posttrain.control.reconciler",
    }
    assert (library["event"], library["level"], library["logger"]) == ("said by a library", "warning", "aiohttp")
    assert (failed["event"], failed["run"]) == ("failed", "team/demo")
    assert failed["exception"].splitlines()[-1] == "KeyError: 'missing'"
