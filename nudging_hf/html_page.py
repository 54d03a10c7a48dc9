"""Pages of HTML that need nothing but themselves. It knows templates, never what they show."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jinja2

# The policy makes sure that the page loads and runs nothing, whatever a model has written.
_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'\
{% block policy %}{% endblock %}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
{{ style | safe }}</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
{% block header %}{% endblock %}
</header>
<main>
{% block main %}{% endblock %}
</main>
</body>
</html>
"""

_ENVIRONMENT = jinja2.Environment(
    autoescape=True,
    keep_trailing_newline=True,
    lstrip_blocks=True,
    loader=jinja2.DictLoader({"page": _PAGE}),
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def render(template: str, **values: Any) -> str:
    """A page. All values are escaped, except the page's `style` (CSS).

    The Jinja template extends "page", which shows `title` too, and whose blocks are "header", "main" and "policy" (the
    end of the content security policy).
    """
    html = _ENVIRONMENT.from_string(template).render(values)
    return html.replace("\r", "&#13;")  # A parser turns a carriage return into a line feed unless it is spelt out.


def write(path: str | os.PathLike[str], html: str) -> None:
    """Writes a page to a file, with the same bytes on every system."""
    Path(path).write_text(html, encoding="utf-8", newline="\n")
