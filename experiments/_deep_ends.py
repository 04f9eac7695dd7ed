"""Which softmax code each flow ends at, and the share of starts of each code."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import ncjax
from experiments._deep_cells import Cell
from ncjax.peeled.nearest import OTHER

Row = dict[str, Any]
# Distance of `ncjax.nearest_code` within which a start is at a code. A start further from
# all codes is on its way at the last time, or at a code that has no closed form.
NEAR = 0.06
BETWEEN = "between codes"
_NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile


def codes_of(cell: Cell) -> dict[str, Any]:
    """Return the codes of closed form that fit into a cell, the least value first."""
    return _codes_of_shape(cell.shape)


@functools.cache
def _codes_of_shape(shape: Cell) -> dict[str, Any]:
    """Return `codes_of`, which takes seconds for many classes, once for all scales."""
    found = ncjax.softmax_codes(
        shape.num_classes, shape.factors - 1, shape.per_class, dim=shape.width
    )
    return dict(sorted(found.items(), key=lambda item: item[1].value))


def end_rows(cell: Cell, part: Mapping[str, np.ndarray]) -> list[Row]:
    """Return a row for each start of a cell: its code, and its constants over theory's."""
    codes, log_t, p = codes_of(cell), float(part["log_times"][-1]), cell.factors
    rows = []
    for start, margin in enumerate(part["least_margin"][:, -1]):
        separated = math.isfinite(margin) and margin > 0
        name, distance = BETWEEN, math.nan
        if separated:
            name, distance = nearest(part["logits"][start])
        squared_norm = float(part["squared_norm"][start, -1])
        log_loss = float(part["log_loss"][start, -1])
        value = codes[name].value if name in codes else math.nan
        # On the clock t L (log t)^(2-2/p) tends to 2V / p².
        loss = math.exp(log_t + log_loss) * log_t ** (2 - 2 / p) if separated else math.nan
        rows.append(
            {
                "num_classes": cell.num_classes,
                "factors": p,
                "width": cell.width,
                "scale": cell.scale,
                "start": start,
                "code": name,
                "distance": distance,
                "value": squared_norm / 2 / margin ** (2 / p) if separated else math.nan,
                "value_of_code": value,
                "norm_constant": squared_norm / log_t ** (2 / p) / (2 * value),
                "loss_constant": loss * p**2 / (2 * value),
                "kkt_angle": float(part["kkt_angle"][start]),
                "failed": bool(part["result"][start] != 0),
            }
        )
    return rows


def nearest(logits: np.ndarray) -> tuple[str, float]:
    """Return the nearest code, or `BETWEEN`, and its distance.

    Args:
      logits: (K, K) of the class means, column k for class k.
    """
    identity = np.eye(len(logits))[:, None]
    as_params = ncjax.Params(jnp.asarray(logits), jnp.asarray(identity))
    found = ncjax.nearest_code(as_params, tol=NEAR)
    return (BETWEEN if found.name == OTHER else found.name), found.distance


def share_rows(cell: Cell, ends: Sequence[Row]) -> list[Row]:
    """Return a row for each code that a start of the cell ends at, and for each minimum."""
    codes = codes_of(cell)
    least = next(iter(codes))
    rows = []
    for name in (*codes, BETWEEN):
        chosen = [row for row in ends if row["code"] == name]
        if not chosen and name not in (least, "simplex"):
            continue
        low, high = wilson(len(chosen), len(ends))
        values = [row["value"] for row in chosen]
        rows.append(
            {
                "num_classes": cell.num_classes,
                "factors": cell.factors,
                "width": cell.width,
                "scale": cell.scale,
                "code": name,
                "starts": len(chosen),
                "share": len(chosen) / len(ends),
                "share_low": low,
                "share_high": high,
                "value": codes[name].value if name in codes else math.nan,
                "value_found": float(np.median(values)) if values else math.nan,
                "least_value": codes[least].value,
                "least_code": least,
            }
        )
    return rows


def wilson(count: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of Wilson for a share of `count` of `total`."""
    z2 = _NORMAL_95**2
    centre = (count + z2 / 2) / (total + z2)
    half = math.sqrt(count * (total - count) / total + z2 / 4)
    half *= _NORMAL_95 / (total + z2)
    return max(centre - half, 0.0), min(centre + half, 1.0)
