"""The report page of the experiments that train a network, and their comparison."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments._labels import LABELS
from experiments._runs import page

_SIDE_BY_SIDE = {
    "within_class_variation": "NC1",
    "mean_norm_variation": "norms of means",
    "mean_cosine_deviation": "angles of means",
    "centred_self_duality": "self-duality, centred",
    "ncc_mismatch": "NC4 mismatch",
}


def _findings(summary: Mapping[str, Any]) -> page.Findings:
    """Compare the metrics at zero training error with those at the end."""
    rows = [summary["metrics"][name] for name in LABELS if name in summary["metrics"]]
    tables = [_metrics(rows)]
    zero = summary["zero_training_error_from_epoch"]
    size = f"{summary['parameters']:,} parameters, {summary['training_images']:,} images"
    if zero is None:
        verdict = f"{size}; the training error is not zero at the end"
        return page.Findings(page.OPEN, verdict, tables)
    compared = [row for row in rows if row["fell"] and "kkt" not in row["metric"]]
    compared = [row for row in compared if row["at_zero_error"]]
    num_fallen = sum(row["fell"] == "True" for row in compared)
    verdict = (
        f"{size}; no training error from epoch {zero}, and {num_fallen} of {len(compared)} "
        "metrics lower at the end"
    )
    state = page.GOOD if num_fallen == len(compared) else page.OPEN
    return page.Findings(state, verdict, tables)


def _metrics(rows: Sequence[Mapping[str, Any]]) -> page.Table:
    """Return a row for each metric, with the test set if there was one."""
    has_test_set = any("test_at_the_end" in row for row in rows)
    head = ["metric", "at zero error", "at the end"]
    return page.Table(
        "Training set in evaluation mode, medians over seeds",
        [*head, *(["test set, at the end"] if has_test_set else []), "fell"],
        [
            [
                *(LABELS[row["metric"]], page.number(row["at_zero_error"])),
                page.number(row["at_the_end"]),
                *([page.number(row.get("test_at_the_end"))] if has_test_set else []),
                {"True": "yes", "False": "no"}.get(row["fell"], ""),
            ]
            for row in rows
        ],
    )


def _side_by_side(sections: Sequence[page.Section]) -> page.Table:
    """Return a row for each network: metrics at zero training error → at the end."""
    return page.Table(
        "Networks side by side: at zero training error → at the end",
        ["network", "images", "epochs", "no error from", *_SIDE_BY_SIDE.values()],
        [_network(section) for section in sections],
    )


def _network(section: page.Section) -> list[str]:
    """Return the row of one network."""
    summary, metrics = section.summary, section.summary["metrics"]
    return [
        section.title,
        page.number(summary["training_images"]),
        section.settings.get("epochs", "–"),
        page.number(summary["zero_training_error_from_epoch"]),
        *(
            "\u00a0→ ".join(
                page.number(metrics.get(name, {}).get(when), 3)
                for when in ("at_zero_error", "at_the_end")
            )
            for name in _SIDE_BY_SIDE
        ),
    ]


PAGE = page.Page(
    title="{model} on {dataset}",
    figures={
        "collapse.png": "NC1 to NC3 over log log of the epoch; white: no training error "
        "any more.",
        "training.png": "Error, loss, margin and NC4.",
    },
    show=_findings,
    compare=_side_by_side,
)
