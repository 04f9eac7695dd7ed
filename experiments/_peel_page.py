"""The report page of the last layer of a network; it needs no network library."""

from collections.abc import Mapping
from typing import Any

from experiments._labels import LABELS
from experiments._runs import page


def _findings(summary: Mapping[str, Any]) -> page.Findings:
    """Compare the network's last layer with the end of the flow from it."""
    points = summary["points"]
    names = [name for name in LABELS if name in next(iter(points.values()))]
    rows = [
        [LABELS[name], *(page.number(point[name]) for point in points.values())]
        for name in names
    ]
    rows.append(["verdict", *(str(point["verdict"]) for point in points.values())])
    table = page.Table(
        "The last layer as a point of the layer-peeled model, and the end of the exact "
        "flow from there",
        ["quantity", *(title.replace("at_log_t_", "at log t = ") for title in points)],
        rows,
    )
    ratios = [page.number(point["margin_ratio"]) for point in points.values()]
    verdict = f"{summary['network']}; margin ratio {' → '.join(ratios)}"
    return page.Findings(page.GOOD, verdict, [table])


PAGE = page.Page(
    title="The flow from the last layer of a network",
    figures={"flow.png": "From the network's last layer, along the exact flow."},
    show=_findings,
)
