"""`ncjax measure`: features and a classifier from files to metrics and a verdict."""

from ncjax.analysis import Analysis, analyze
from ncjax.command import arrays, device, output
from ncjax.command.output import BadUse, naming

_NAMES = ("features", "labels", "W", "b")


def run(options) -> None:
    """Print the analysis of the arrays that the options name."""
    output.check_plot(options.plot, options.overwrite)
    if options.layers and options.convention:
        raise BadUse("--convention is for the last layer; give it without --layers")
    found = _arrays(options)
    with device.ready(options.float64):
        if options.layers:
            from ncjax.command import layers

            layers.measure(found, options)
            return
        result = analysed(found, options, options.convention)
        if options.json:
            output.show_json(as_dict(result))
        else:
            print(result)
        if options.plot:
            output.save_plot(result.plot(), options.plot)


def analysed(found: arrays.Arrays, options, convention: str | None = None) -> Analysis:
    """Return the analysis of arrays, with errors that name their file."""
    features, labels = found["features"], found["labels"]
    W, b = found.get("W"), found.get("b")
    if W is None:
        output.note(f"{found.name}: no W, so only the features are measured")
    with naming(found.name):
        return analyze(
            features,
            labels,
            W,
            b,
            convention=convention,
            min_count=options.min_count,
            progress=output.Progress(f"reading {found.name}"),
        )


def as_dict(result: Analysis) -> dict:
    """Return numbers, verdict and notes for JSON."""
    return result.as_dict() | {"verdict": result.verdict, "notes": result.notes}


def _arrays(options) -> arrays.Arrays:
    """Return the arrays of DATA, or of the files given one by one."""
    files = {n: getattr(options, n) for n in _NAMES if getattr(options, n) is not None}
    if options.data is None:
        if not files:
            raise BadUse("expected DATA, or --features=FILE --labels=FILE; see --help")
        for name in ("features", "labels"):
            if name not in files:
                raise BadUse(f"expected --{name}=FILE too, or DATA; see --help")
        return arrays.from_files(files)
    if files:
        flags = ", ".join(f"--{name}" for name in files)
        raise BadUse(f"got DATA and {flags}; give one .npz or folder, or single files")
    return arrays.from_path(options.data)
