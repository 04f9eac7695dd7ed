"""Replace the TeX that arithmatex leaves by MathML: pages need no script, no network."""

import html
import re
import unicodedata

from latex2mathml.converter import convert

_MATH = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', flags=re.DOTALL
)
_VARIANT = re.compile(r'<(mi|mn) mathvariant="(script|double-struck|bold)">(.)</\1>')
_FUNCTION = re.compile(r"<mi>([a-z]{2,})</mi>(?!<mo[^>]*>(?:\(|&#x00028;))")
_CALLED = re.compile(r"<mi>([a-z]{2,})</mi>")
_OPENED = re.compile(r'(&#x00028;</mo>)<mo lspace="0.17em"')
_TIGHT = re.compile(r"<mo[^>]*>(\||/|&#x0007C;|&#x0002F;)</mo>")


def on_page_content(content: str, **_kwargs) -> str:
    """Return the page with every formula as MathML."""
    return _MATH.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    """Convert one formula to the MathML that all browsers show."""
    display = "inline" if found[2] == "(" else "block"
    text = convert(html.unescape(found[3]).strip(), display=display)
    text = _VARIANT.sub(_letter, text)
    text = _FUNCTION.sub(r'<mo lspace="0.17em" rspace="0.17em">\1</mo>', text)
    text = _CALLED.sub(r'<mo lspace="0.17em" rspace="0">\1</mo>', text)
    text = _OPENED.sub(r'\1<mo lspace="0"', text)
    text = _TIGHT.sub(r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', text)
    if display == "inline":
        return text
    return f'<div style="overflow-x: auto; overflow-y: hidden">{text}</div>'


def _letter(found: re.Match[str]) -> str:
    """Replace a script, double-struck or bold letter by the letter of Unicode."""
    tag, style, letter = found[1], found[2].upper(), found[3]
    name = unicodedata.name(letter).replace("LATIN ", "").replace("LETTER ", "")
    for full in (f"{style} {name}", f"MATHEMATICAL {style} {name}"):
        try:
            return f"<{tag}>{unicodedata.lookup(full)}</{tag}>"
        except KeyError:
            continue
    raise ValueError(f"no {style} form of {letter!r} in Unicode")
