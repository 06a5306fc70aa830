"""Run programs on the machines of a service by its SDK, in the trainer's environment.

    python rent_cases.py CASES.json OUT.json

CASES holds `{mode, template, api_key, parallel, programs}`; OUT what came of each program, or the error's text.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from posttrain_workloads.rewards.execution import ExecutionError, Program
from posttrain_workloads.rewards.rented import RentedSandbox, open_machine


def main() -> None:
    cases, out = (Path(argument) for argument in sys.argv[1:])
    asked = json.loads(cases.read_text())
    sandbox = RentedSandbox(
        asked["mode"],
        open_machine(asked["mode"], api_key=asked["api_key"], template=asked["template"]),
        parallel=asked["parallel"],
        max_memory_bytes=1 << 29,
        pause=lambda seconds: None,
    )

    def run(program: dict[str, Any]) -> dict[str, Any]:
        files = (("main.py", program.pop("code")),)
        try:
            return dataclasses.asdict(sandbox.run(Program(language="python", files=files, **program)))
        except ExecutionError as error:
            return {"error": str(error)}

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(run, asked["programs"]))
    out.write_text(json.dumps({"results": results}))


if __name__ == "__main__":
    main()
