"""Show numbers by name as lines of text and as HTML."""

import html
import math
from collections.abc import Iterable, Mapping

# The names of a report under the property that they measure.
PROPERTIES = {
    "NC1 variation within classes": (
        "within_class_quotient",
        "within_class_variation",
        "cdnv",
    ),
    "NC2 simplex": (
        "mean_norm_variation",
        "mean_cosine_deviation",
        "etf_gram_error",
        "centred_classifier_norm_variation",
        "centred_classifier_cosine_deviation",
        "classifier_norm_variation",
        "classifier_cosine_deviation",
    ),
    "NC3 self-duality": ("centred_self_duality", "self_duality", "product_etf_error"),
    "NC4 nearest class centre": ("ncc_mismatch", "accuracy"),
    "Sums and norms": (
        "classifier_sum",
        "relative_classifier_sum",
        "mean_feature_norm",
    ),
}
_NAME_COLUMNS = 38


def sections(values: Mapping[str, float]) -> list[tuple[str, dict[str, float]]]:
    """Return the values that are numbers by property, and no property without any."""
    found = []
    for title, names in PROPERTIES.items():
        known = {n: values[n] for n in names if not math.isnan(values.get(n, math.nan))}
        if known:
            found.append((title, known))
    return found


def text(head: str, parts: Iterable[tuple[str, Mapping[str, float]]]) -> str:
    """Return a table in lines: a head, then titles with their rows below."""
    lines = [head]
    for title, rows in parts:
        lines += ["", title]
        lines += [f"  {name:<{_NAME_COLUMNS}}{x:>11.4g}" for name, x in rows.items()]
    return "\n".join(lines)


def as_html(
    head: str, parts: Iterable[tuple[str, Mapping[str, float]]], sentences: Iterable[str]
) -> str:
    """Return the table and sentences below it as HTML, every text escaped."""
    rows = [f'<tr><th colspan="2">{html.escape(head)}</th></tr>']
    for title, numbers in parts:
        rows.append(f'<tr><th colspan="2">{html.escape(title)}</th></tr>')
        rows += [
            f"<tr><td>{html.escape(name)}</td><td>{value:.4g}</td></tr>"
            for name, value in numbers.items()
        ]
    below = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences)
    return f"<div><table>{''.join(rows)}</table>{below}</div>"
