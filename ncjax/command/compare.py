"""`ncjax compare`: the metrics of two sets of features side by side."""

import math

from ncjax.analysis import Analysis
from ncjax.analysis.table import PROPERTIES
from ncjax.command import arrays, device, output
from ncjax.command.measure import analysed, as_dict

# Shares are compared by their difference, because a share may be 0.
_SHARES = ("ncc_mismatch", "accuracy")
# What the verdict compares, in words.
_JUDGED = {
    "within_class_quotient": "variation within classes",
    "mean_cosine_deviation": "deviation of the angles",
    "centred_self_duality": "distance from self-duality",
}
_EQUAL = 0.01  # relative difference that counts as none


def run(options) -> None:
    """Print two columns, their ratio or difference, and a verdict."""
    sources = [arrays.from_path(path) for path in (options.first, options.second)]
    with device.ready(options.float64):
        results = [analysed(found, options) for found in sources]
        names = [found.name for found in sources]
        numbers = [result.as_dict() for result in results]
        sentence = verdict(names, numbers)
        if options.json:
            entries = [as_dict(result) for result in results]
            change = {n: _change(n, *numbers)[0] for n in _shown(numbers)}
            output.show_json(
                {"first": entries[0], "second": entries[1]}
                | {"change": change, "verdict": sentence}
            )
        else:
            print(table(names, numbers))
            print(f"\n{sentence}")
            _note_limits(names, results)


def table(names: list[str], numbers: list[dict[str, float]]) -> str:
    """Return the lines: name, first, second, second / first or second - first."""
    width = 2 + max(map(len, _shown(numbers)))
    columns = [name[-14:] for name in names]
    if columns[0] == columns[1]:
        columns = ["first", "second"]
    lines = [f"{'':<{width}}{columns[0]:>15}{columns[1]:>15}{'change':>12}"]
    for name in _shown(numbers):
        first, second = (values[name] for values in numbers)
        _, shown = _change(name, *numbers)
        lines.append(f"{name:<{width}}{first:>15.4g}{second:>15.4g}{shown:>12}")
    return "\n".join(lines)


def verdict(names: list[str], numbers: list[dict[str, float]]) -> str:
    """Return one sentence: which of the two is nearer to collapse, and in what."""
    nearer, farther, parts = 0, 0, []
    for name, words in _JUDGED.items():
        first, second = (values[name] for values in numbers)
        if not (math.isfinite(first) and math.isfinite(second) and first > 0):
            continue
        ratio = second / first
        nearer += ratio < 1 - _EQUAL
        farther += ratio > 1 + _EQUAL
        parts.append(f"its {words} is {_times(ratio)}")
    if not parts:
        return f"{names[0]} and {names[1]} have no number in common to compare."
    if nearer and farther:
        head = f"{names[1]} is nearer to collapse than {names[0]} in some ways only"
    elif nearer or farther:
        head = f"{names[1]} is {'nearer to' if nearer else 'farther from'} collapse than "
        head += names[0]
    else:
        head = f"{names[1]} is as near to collapse as {names[0]}"
    return f"{head}: {', '.join(parts)}."


def _shown(numbers: list[dict[str, float]]) -> list[str]:
    """Return the metrics that both have, in the order of the table."""
    names = [name for group in PROPERTIES.values() for name in group]
    return [n for n in names if all(math.isfinite(v.get(n, math.nan)) for v in numbers)]


def _change(name: str, before: dict, after: dict) -> tuple[float, str]:
    """Return ratio or difference, as a number and as it is shown."""
    first, second = before[name], after[name]
    if name in _SHARES:
        return second - first, f"{second - first:+.4g}"
    ratio = second / first if first else math.nan
    return ratio, f"x {ratio:.3g}" if math.isfinite(ratio) else "-"


def _times(ratio: float) -> str:
    if abs(ratio - 1) <= _EQUAL:
        return "as large"
    return f"{ratio:.2g} times as large" if ratio < 100 else f"{ratio:,.0f} times as large"


def _note_limits(names: list[str], results: list[Analysis]) -> None:
    sizes = [int(result.measured.sum()) for result in results]
    if sizes[0] != sizes[1]:
        output.note(
            f"{names[0]} has {sizes[0]} classes and {names[1]} has {sizes[1]}: most "
            "metrics depend on the number of classes"
        )
    for name, result in zip(names, results, strict=True):
        for sentence in result.notes:
            output.note(f"{name}: {sentence}")
