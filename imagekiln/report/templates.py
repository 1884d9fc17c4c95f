"""The templates of the pages: strict about names, and escaping everything that comes from outside."""

from __future__ import annotations

import jinja2


def template(name: str) -> jinja2.Template:
    """The template of this file name.

    >>> template("parts.html").module.image({"source": "data:", "width": 1, "height": 2, "shows": "<b>"}).strip()
    Markup('<img src="data:" width="1" height="2" alt="&lt;b&gt;">')
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("imagekiln", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
