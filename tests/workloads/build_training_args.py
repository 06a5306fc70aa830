"""Build a class of TRL once for each set of arguments, and render its table anew; in the trainer's environment.

    python build_training_args.py CASES.json OUT.json GENERATE_TABLES.py

CASES maps a table's name to a list of objects of arguments; OUT gets for each name `errors` (a message or null for
each) and `table` (the file's text).
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any


def main() -> None:
    cases, out, script = (Path(argument) for argument in sys.argv[1:])
    import trl

    warnings.simplefilter("ignore")
    spec = importlib.util.spec_from_file_location("generate_tables", script)
    assert spec is not None and spec.loader is not None
    generate_tables = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = generate_tables  # its dataclasses look their module up
    spec.loader.exec_module(generate_tables)
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, sets in json.loads(cases.read_text()).items():
            build = getattr(trl, generate_tables.TABLES_BY_NAME[name].class_name)
            errors = [
                try_to_build(build, {"output_dir": folder, "use_cpu": True, "bf16": False} | args) for args in sets
            ]
            answers[name] = {"errors": errors, "table": generate_tables.render_table(name)}
    out.write_text(json.dumps(answers))


def try_to_build(build: Any, args: dict[str, Any]) -> str | None:
    """Return what the class says against the arguments."""
    try:
        build(**args)
    except Exception as error:  # whatever the class raises is the answer
        return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    main()
