"""Read docstrings in the style of ncjax: comments behind fields, examples unheaded."""

import re

import griffe

_COMMENT = re.compile(r"\s#\s*(.*)$")
_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Turn comments into docstrings of fields, and doctests into blocks of code."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_kwargs) -> None:
        """Make the comment in `loss: Array  # mean` the docstring of `loss`."""
        if attr.docstring or attr.lineno is None:
            return
        line = attr.filepath.read_text().splitlines()[attr.lineno - 1]
        if found := _COMMENT.search(line):
            attr.docstring = griffe.Docstring(found[1].replace("*", r"\*"), parent=attr)

    def on_instance(self, *, obj: griffe.Object, **_kwargs) -> None:
        """Fence the doctests of a docstring."""
        if obj.docstring:
            fenced = _EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
            obj.docstring.value = fenced
