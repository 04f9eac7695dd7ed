"""The report page of a network flow, and the comparison of several."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments._labels import LABELS
from experiments._runs import page

# A metric counts as collapsed if it is no larger than after the usual training: stochastic
# gradient descent with weight decay 5e-4 for 2000 epochs, with a rate that falls after each
# fifth, of ResNet18 on 500 images of MNIST (results/train/resnet18_mnist_decay2000).
FIELD = {
    "within_class_variation": 5.37e-3,
    "within_class_quotient": 1.15e-2,
    "mean_norm_variation": 2.22e-2,
    "mean_cosine_deviation": 5.63e-2,
    "centred_self_duality": 0.267,
}
_SIDE_BY_SIDE = {
    "within_class_variation": "NC1, Tr(Σ_W Σ_B⁺)/K",
    "within_class_quotient": "NC1, Tr Σ_W / Tr Σ_B",
    "mean_norm_variation": "NC2, norms of means",
    "mean_cosine_deviation": "NC2, angles of means",
    "centred_self_duality": "NC3, centred",
}


def _findings(summary: Mapping[str, Any]) -> page.Findings:
    """Show the metrics over log t, the end of each seed, and the last layer there."""
    endings = summary["endings"]
    size = f"{summary['parameters']:,} parameters, {summary['training_images']:,} images"
    reached = [ending["log_t"] for ending in endings if not ending["result"]]
    if not reached:
        return page.Findings(page.OPEN, f"{size}; no seed came to the end", [])
    metrics = summary["metrics"]
    collapsed = [name for name in FIELD if metrics[name]["at_the_end"] <= FIELD[name]]
    verdict = (
        f"{size}; {len(reached)} of {len(endings)} seeds to log t = "
        f"{page.number(min(reached))}; {len(collapsed)} of {len(FIELD)} metrics no larger "
        "than after training with weight decay"
    )
    state = page.GOOD if len(collapsed) == len(FIELD) else page.OPEN
    tables = [_metrics(metrics), _endings(endings)]
    if "last_layer" in summary:  # not if the loss of seed 0 was NaN
        tables.append(_last_layer(summary))
    return page.Findings(state, verdict, tables)


def _metrics(metrics: Mapping[str, Mapping[str, Any]]) -> page.Table:
    """Return a row for each metric: its values over log t, and the field's."""
    rows = [metrics[name] for name in LABELS if name in metrics]
    columns = [name for name in rows[0] if name != "metric"]
    return page.Table(
        "Training set, medians over seeds; the last column is the value after training "
        "with weight decay, for comparison",
        ["metric", *(name.replace("_", " ") for name in columns), "with weight decay"],
        [
            [
                LABELS[row["metric"]],
                *(page.number(row.get(name), 3) for name in columns),
                page.number(FIELD.get(row["metric"]), 3),
            ]
            for row in rows
        ],
    )


def _endings(endings: Sequence[Mapping[str, Any]]) -> page.Table:
    """Return a row for each seed."""
    return page.Table(
        "The end of each seed",
        ["seed", "log t", "log L", "gradients", "steps refused"],
        [
            [
                str(seed),
                *(page.number(ending[name]) for name in ("log_t", "log_loss")),
                *(page.number(ending[name]) for name in ("gradients", "refused")),
            ]
            for seed, ending in enumerate(endings)
        ],
    )


def _last_layer(summary: Mapping[str, Any]) -> page.Table:
    """Return the description of the last layer of seed 0, at equal norms."""
    point = summary["last_layer"]
    rows = [[LABELS[name], page.number(point[name])] for name in LABELS if name in point]
    return page.Table(
        "The last layer of seed 0 as a point of the layer-peeled model, at equal norms of "
        "W and H",
        ["quantity", "value"],
        [*rows, ["verdict", str(point["verdict"])]],
    )


def _side_by_side(sections: Sequence[page.Section]) -> page.Table:
    """Return a row for each network: where it came, and what it measured there."""
    return page.Table(
        "Gradient flow of networks side by side, medians over seeds at the end",
        ["network", "images", "log t", "gradients", *_SIDE_BY_SIDE.values()],
        [_network(section) for section in sections],
    )


def _network(section: page.Section) -> list[str]:
    """Return the row of one network."""
    summary, ending = section.summary, section.summary["endings"][0]
    metrics = summary.get("metrics", {})
    return [
        section.title,
        page.number(summary["training_images"]),
        page.number(ending["log_t"]),
        page.number(ending["gradients"]),
        *(
            page.number(metrics.get(name, {}).get("at_the_end"), 3)
            for name in _SIDE_BY_SIDE
        ),
    ]


PAGE = page.Page(
    title="Gradient flow of {model} on {dataset}",
    figures={
        "collapse.png": "NC1 to NC3 over log log t, t the physical time.",
        "margins.png": "Margins, KKT angle and loss.",
        "duality.png": "What remains of self-duality and of the angles.",
        "homogeneity.png": "A homogeneous network: normalised margin, KKT angle, growth.",
    },
    optional=("homogeneity.png",),
    show=_findings,
    compare=_side_by_side,
)
