"""`ncjax certify`: whether (W, H) is an optimal direction of the layer-peeled model."""

import numpy as np

from ncjax.arrays import as_array
from ncjax.command import arrays, device, output
from ncjax.command.output import BadUse, naming
from ncjax.metrics import balance_norms, peel
from ncjax.peeled import VERDICTS, certificate, kkt_angle, margin_ratio
from ncjax.peeled.margin_bound import value_or_bound
from ncjax.types import Array, Params

# Numbers of the system that fits the multipliers by non-negative least squares: 200 MB.
_MOST_NUMBERS = 2.5e7


def run(options) -> None:
    """Print the certificate of the point in the file, in float64."""
    found = arrays.from_path(options.data)
    with device.ready(float64=True), naming(found.name):
        params = balance_norms(_params(found, options.per_class))
        multipliers = _multipliers(options.multipliers, params)
        result = certificate(params, multipliers=multipliers, tol=options.tol)
        words = VERDICTS[int(result.verdict)]
        numbers = {
            "margin_ratio": float(margin_ratio(params, value=value_or_bound(params))),
            "kkt_angle": float(kkt_angle(params)),
            "residual": float(result.residual),
            "sigma_max": float(result.sigma_max),
            "duality_gap": float(result.gap),
            "excess_norm": float(result.excess),
            "tolerance": float(result.tolerance),
        }
    if options.json:
        output.show_json(numbers | {"multipliers": multipliers, "verdict": words})
        return
    num_classes, per_class, dim = params.H.shape
    print(f"K={num_classes} n={per_class} d={dim}, W and H scaled to equal norms\n")
    for name, value in numbers.items():
        print(f"{name:<14}{value:>12.4g}   {_MEANINGS[name]}")
    print(f"\n{words[0].upper()}{words[1:]} (multipliers: {multipliers}).")


_MEANINGS = {
    "margin_ratio": "least margin over the largest at this norm, 1 at the optimum",
    "kkt_angle": "sine of the angle between Z and minus the gradient, 0 at a KKT direction",
    "residual": "of the KKT conditions, relative",
    "sigma_max": "of the dual certificate, at most 1 at the optimum",
    "duality_gap": "over the least possible squared norm",
    "excess_norm": "squared norm over the least possible one, minus 1",
    "tolerance": "largest residual, and excess of sigma_max over 1, taken as zero",
}


def _params(found: arrays.Arrays, per_class: int | None) -> Params:
    W = _floating(found, "W")
    if "H" in found.keys:
        if per_class is not None:
            raise BadUse(f"{found.name}: --per-class is for features, but the file has H")
        return Params(W, _floating(found, "H"))
    if "features" not in found.keys:
        given = ", ".join(found.keys)
        raise BadUse(
            f"{found.name}: expected W and H, or features, labels and W; got {given}"
        )
    b = None if found.get("b") is None else _floating(found, "b")
    features = _floating(found, "features")
    return peel(features, found["labels"], W, b, per_class=per_class)


def _floating(found: arrays.Arrays, key: str) -> Array:
    """Return an array, in float64 if it is floating."""
    array = as_array(key, found[key])
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _multipliers(requested: str, params: Params) -> str:
    if requested != "auto":
        return requested
    num_classes, per_class, dim = params.H.shape
    unknowns = num_classes * per_class * (num_classes - 1)
    equations = num_classes * (1 + per_class) * dim + unknowns
    return "nnls" if unknowns * equations <= _MOST_NUMBERS else "softmax"
