"""The chart's roles, read from its template without helm: so that every test with an API server can be bound by them.

It owns how the template is read; it must not know what the roles grant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

TEMPLATE = Path(__file__).parents[2] / "charts" / "posttrain" / "templates" / "rbac.yaml"


def read_rights(
    *, namespace: str, release: str = "posttrain", lease: str = "posttrain-operator"
) -> list[dict[str, Any]]:
    """Return service account, roles and bindings, without labels; all but two roles are named `<release>-operator`."""
    text = TEMPLATE.read_text(encoding="utf-8")
    for expression, value in {
        '{{ include "posttrain.fullname" . }}': release,
        '{{ include "posttrain.leaseName" . | quote }}': lease,
        "{{ .Release.Namespace }}": namespace,
    }.items():
        text = text.replace(expression, value)
    # What is left are the template's own comment, and lines of labels.
    text = text.partition("*/ -}}\n")[2]
    lines = [line for line in text.splitlines() if "{{" not in line]
    return [
        {**document, "metadata": {name: value for name, value in document["metadata"].items() if name != "labels"}}
        for document in yaml.safe_load_all("\n".join(lines))
    ]
