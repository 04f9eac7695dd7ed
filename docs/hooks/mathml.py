"""MathML in place of the TeX that arithmatex leaves: pages need no script, no network."""

import html
import re

from latex2mathml.converter import convert

_MATH = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', flags=re.DOTALL
)


def on_page_content(content: str, **_kwargs) -> str:
    """The page with every formula as MathML."""
    return _MATH.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    display = "inline" if found[2] == "(" else "block"
    return convert(html.unescape(found[3]).strip(), display=display)
