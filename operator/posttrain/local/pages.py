"""The self-contained HTML pages: template, style and script in one file.

It owns how a page is put together; it must not know what stands in it.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jinja2

from posttrain.local.curves import format_value
from posttrain.local.status_text import format_bytes, format_duration


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("posttrain.local"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(bytes=format_bytes, duration=format_duration, value=format_value)
    return environment


def write_page(out: Path, *, template: str, **content: object) -> None:
    """Write the page `template` to `out`, whole or not at all."""
    text = _environment().get_template(template).render(content)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(out)
