"""The report page of the layers of a network; it needs no network library."""

from collections.abc import Mapping
from typing import Any

from experiments._labels import LABELS
from experiments._runs import page

# The law counts as observed from this R² on.
_OBSERVED = 0.9
_OF_LAYERS = {
    "fuzziness": "NC1  separation fuzziness Tr(Σ_W SS_b⁺)",
    "ncc_accuracy": "accuracy of the nearest class mean",
    "numerical_rank": "numerical rank",
    "stable_rank": "stable rank",
    "effective_rank": "effective rank",
}


def _findings(summary: Mapping[str, Any]) -> page.Findings:
    """Show the law of data separation, the tunnel, and the last layer."""
    law, tunnel, last = summary["law"], summary["tunnel"], summary["last"]
    tables = [
        _over_depth(law, tunnel, len(summary["layers"])),
        _last_layer(last),
        _training(summary["training"]),
    ]
    r_squared = law["train"]["r_squared"]
    verdict = (
        f"{summary['network']}; each layer multiplies D by "
        f"{page.number(law['train']['decay_ratio'], 3)}, R² = {page.number(r_squared, 3)}"
    )
    state = page.GOOD if (r_squared or 0) >= _OBSERVED else page.OPEN
    return page.Findings(state, verdict, tables)


def _over_depth(law, tunnel, size: int) -> page.Table:
    """Return a row for each quantity over depth, with a column for each split."""
    rows = [
        ["factor of D per layer, ρ", *(page.number(law[s]["decay_ratio"]) for s in law)],
        ["R² of log D against depth", *(page.number(law[s]["r_squared"]) for s in law)],
        ["first layer of the tunnel", *(str(tunnel[s]["layer"]) for s in law)],
        [f"layers of the tunnel, of {size}", *(str(tunnel[s]["length"]) for s in law)],
        [
            "rank of the last layer / at the start of the tunnel",
            *(page.number(tunnel[s]["rank_ratio"]) for s in law),
        ],
    ]
    caption = "Over depth: the law of data separation, and the tunnel"
    return page.Table(caption, ["quantity", *(f"{split} set" for split in law)], rows)


def _last_layer(last: Mapping[str, Mapping[str, Any]]) -> page.Table:
    """Return a row for each metric of the last layer."""
    labels = LABELS | _OF_LAYERS
    names = [name for name in next(iter(last.values())) if name in labels]
    rows = [[labels[name], *(page.number(last[s][name]) for s in last)] for name in names]
    head = ["metric", *(f"{split} set" for split in last)]
    return page.Table("The input of the classifier", head, rows)


def _training(training: Mapping[str, Any]) -> page.Table:
    """Return how the network was trained."""
    names = [name for name in ("command", "date", "device", "platform") if name in training]
    rows = [[name, str(training[name])] for name in names]
    return page.Table("The training of the network", ["setting", "value"], rows)


PAGE = page.Page(
    title="Every layer of a network",
    figures={"layers.png": "Separation, accuracy, ranks and class means over depth."},
    show=_findings,
)
