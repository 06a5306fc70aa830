"""Build trl.SFTConfig once for each set of arguments, and render the table anew; in the trainer's environment.

    python build_sft_configs.py CASES.json OUT.json GENERATE_TABLES.py

CASES is a list of objects of arguments; OUT gets `errors` (a message or null for each) and `table` (the file's text).
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import warnings
from pathlib import Path


def main() -> None:
    cases, out, script = (Path(argument) for argument in sys.argv[1:])
    from trl import SFTConfig

    warnings.simplefilter("ignore")
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        for args in json.loads(cases.read_text()):
            try:
                SFTConfig(**{"output_dir": folder, "use_cpu": True, "bf16": False} | args)
                errors.append(None)
            except Exception as error:  # whatever the class raises is the answer
                errors.append(f"{type(error).__name__}: {error}")
    spec = importlib.util.spec_from_file_location("generate_tables", script)
    assert spec is not None and spec.loader is not None
    generate_tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate_tables)
    out.write_text(json.dumps({"errors": errors, "table": generate_tables.render_sft_config()}))


if __name__ == "__main__":
    main()
