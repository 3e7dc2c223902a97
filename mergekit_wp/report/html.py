"""Pages from the templates of this package."""

from __future__ import annotations

from typing import Any

import jinja2


def filled(template: str, **values: Any) -> str:
    """A page; what is not `Markup` is escaped, and a name the template misses is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mergekit_wp.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(**values)
