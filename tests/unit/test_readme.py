"""The README says what is so."""

from __future__ import annotations

import re
from pathlib import Path

from posttrain.api.loader import load_documents
from posttrain.api.validate import parse_training_run

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_resource_is_valid() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (document,) = load_documents(text, origin="README.md")

    assert parse_training_run(document.data).metadata.name == "stratos"


def test_its_commands_are_those_of_the_command_line() -> None:
    source = (ROOT / "operator" / "posttrain" / "cli.py").read_text(encoding="utf-8")
    commands = set(re.findall(r"^@app\.command\(\)\ndef (\w+)\(", source, re.MULTILINE))

    assert set(re.findall(r"^\| `posttrain (\w+)", README, re.MULTILINE)) == commands - {"version"}


def test_its_targets_are_the_makefiles_and_what_ci_runs() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([\w-]+)", README))

    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    assert {"setup", "check", "verify", "test", "e2e", "quickstart"} <= targets
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r"for target in setup check verify;", ci)
    assert ci.endswith("exec make test-all\n")
    assert targets >= {"cluster-binaries", "test-all"}


def test_its_links_and_folders_exist() -> None:
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
    for row in re.findall(r"^\| (`[\w/.]+`(?:, `[\w/.]+`)*) \|", README, re.MULTILINE):
        for folder in re.findall(r"`([^`]+)`", row):
            assert (ROOT / folder).exists(), folder
