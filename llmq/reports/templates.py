"""The pages' templates, which share one look and need nothing but themselves."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from llmq.reports import svg


def render(name: str, **values: Any) -> str:
    """A page as HTML. name: of the file in `html`."""
    return _environment().get_template(name).render(**values)


def megabytes(n_bytes: float) -> str:
    """Bytes for people."""
    return f"{n_bytes / 1e6:,.1f} MB"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("llmq.reports", "html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"megabytes": megabytes, "plain": svg.number}
    return environment
