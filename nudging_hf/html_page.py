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
:root { color-scheme: light dark;
{{ colours | safe }}}
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

# The colours and the style of all pages. A page's own come after them.
COLOURS = """--ink: light-dark(#1b1b1b, #ececec); --paper: light-dark(#fff, #16181b);
--faint: light-dark(#5c5c5c, #a8a8a8); --rule: light-dark(#d8d8d8, #3a3d42); --panel: light-dark(#f5f5f5, #1f2226);
"""
STYLE = """body { margin: 0 auto; max-width: 46rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 1.0625rem/1.65 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; }
h2 { font-size: .8rem; font-weight: 600; color: var(--faint); margin: 1.25rem 0 .35rem; }
header p { margin: 0 0 .5rem; color: var(--faint); font-size: .95rem; }
article { border-top: 1px solid var(--rule); margin-top: 1.5rem; padding-top: .25rem; }
dl { display: flex; flex-wrap: wrap; gap: .15rem 1.5rem; margin: 1rem 0 0; font-size: .875rem; color: var(--faint); }
dl div { display: flex; flex-wrap: wrap; gap: 0 .4rem; }
dd { margin: 0; color: var(--ink); overflow-wrap: anywhere; }
"""

_ENVIRONMENT = jinja2.Environment(
    autoescape=True,
    keep_trailing_newline=True,
    lstrip_blocks=True,
    loader=jinja2.DictLoader({"page": _PAGE}),
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def render(template: str, style: str = "", colours: str = "", **values: Any) -> str:
    """A page. All values are escaped, except the page's `style` (CSS), which comes after `STYLE`.

    The Jinja template extends "page", which shows `title` too, and whose blocks are "header", "main" and "policy" (the
    end of the content security policy).
    """
    html = _ENVIRONMENT.from_string(template).render(colours=COLOURS + colours, style=STYLE + style, **values)
    return html.replace("\r", "&#13;")  # A parser turns a carriage return into a line feed unless it is spelt out.


def write(path: str | os.PathLike[str], html: str) -> None:
    """Writes a page to a file, with the same bytes on every system."""
    Path(path).write_text(html, encoding="utf-8", newline="\n")
