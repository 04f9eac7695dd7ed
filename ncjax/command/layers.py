"""`ncjax measure --layers`: every layer of a network."""

import numpy as np

from ncjax.arrays import as_array
from ncjax.command import arrays, output
from ncjax.command.output import BadUse, naming
from ncjax.metrics.layers import Layerwise, layerwise

_COLUMNS = {
    "dim": "dim",
    "within_class_quotient": "NC1",
    "fuzziness": "fuzziness",
    "mean_cosine_deviation": "NC2 angles",
    "ncc_accuracy": "NCC acc.",
    "numerical_rank": "rank",
}
_NOT_LAYERS = ("labels", "W", "b")


def measure(found: arrays.Arrays, options) -> None:
    """Print a row for each layer, the law of data separation and the tunnel."""
    given, labels = _features(found), found["labels"]
    with naming(found.name):
        features = {name: as_array(name, array) for name, array in given.items()}
        result = layerwise(
            features, as_array("labels", labels), min_count=options.min_count
        )
    if options.json:
        output.show_json(result.as_dict())
    else:
        print(table(result))
    if options.plot:
        from ncjax import plotting

        output.save_plot(plotting.layers_figure({"features": result}), options.plot)


def table(result: Layerwise) -> str:
    """Return the lines: a row for each layer, then the law and the tunnel."""
    width = 2 + max(len("layer"), *map(len, result.names))
    titles = "".join(f"{title:>12}" for title in _COLUMNS.values())
    lines = [f"{'layer':<{width}}{titles}"]
    for row in result.rows():
        numbers = "".join(f"{row[name]:>12.4g}" for name in _COLUMNS)
        lines.append(f"{row['layer']:<{width}}{numbers}")
    if len(result.names) == 1:  # neither a line nor a tunnel
        return "\n".join(lines)
    law, tunnel = result.law, result.tunnel
    lines += [
        "",
        f"Law of data separation: the fuzziness changes by a factor of "
        f"{float(law.decay_ratio):.3g} per layer, R² = {float(law.r_squared):.3g}.",
        f"Tunnel: {int(tunnel.length)} of {len(result.names)} layers, from "
        f"{result.names[int(tunnel.start)]} on.",
    ]
    return "\n".join(lines)


def _features(found: arrays.Arrays) -> dict[str, np.ndarray]:
    """Return the features of each layer, in the order of the file.

    They are the arrays `features/NAME`; without any, all floating arrays of two axes or
    more other than W.
    """
    named = found.nested("features")
    if named:
        return named
    others = {key: found[key] for key in found.keys if key not in _NOT_LAYERS}
    layers = {k: x for k, x in others.items() if x.ndim > 1 and x.dtype.kind == "f"}
    if not layers:
        raise BadUse(
            f"{found.name}: --layers needs arrays features/NAME, got "
            f"{', '.join(found.keys)}; write np.savez('layers.npz', labels=labels, "
            "**{'features/conv1': conv1, 'features/fc': fc})"
        )
    return layers
