"""The arguments of each command; imports neither NumPy nor JAX."""

import argparse
import difflib
import math
import os
from collections.abc import Callable, Sequence

from ncjax.command.output import BadUse

_LARGEST_SEED = 2**63 - 1
_CODES = (
    "Data goes to stdout, notes and errors to stderr.\n"
    "Exit codes: 0 done, 1 failed, 2 bad use or bad input, 130 interrupted."
)
_DATA = """\
DATA is a .npz file, or a folder of .npy files, with the arrays
  features  (N, d) floating, the input of the last layer
  labels    (N,)   integers from 0 to K - 1, or -100 to leave a sample out
  W         (K, d) weight of the last layer; without it only NC1 and NC2 are measured
  b         (K,)   its bias, if it has one
.npy files are memory-mapped and may be larger than memory.
"""


def parse(argv: Sequence[str]) -> argparse.Namespace | None:
    """Return the options of one command, or None after help or the version was printed.

    Raises:
      BadUse: an argument is unknown, missing or out of range.
    """
    if argv and not argv[0].startswith("-") and argv[0] not in _COMMANDS:
        nearest = _nearest(argv[0], list(_COMMANDS))
        choices = ", ".join(_COMMANDS)
        raise BadUse(f"unknown command {argv[0]!r}{nearest}expected one of {choices}")
    parser = _parser()
    try:
        options, unknown = parser.parse_known_args(argv)
    except SystemExit:
        return None
    if options.command is None:
        raise BadUse(f"expected a command, one of {', '.join(_COMMANDS)}; see ncjax --help")
    if unknown:
        known = [flag for flag in options.flags if flag.startswith("--")]
        raise BadUse(_unknown(unknown[0], known, options.command))
    return options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        message = message.removeprefix("argument ")
        raise BadUse(f"{message}; see {self.prog} --help")


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        from importlib.metadata import version  # takes a tenth of the time of --help

        print(f"ncjax {version('ncjax')}, jax {version('jax')}")
        parser.exit()


def _parser() -> _Parser:
    parser = _Parser(
        prog="ncjax",
        description="Measure neural collapse: features and last layers of networks.",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="show the versions of ncjax and JAX"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (summary, add) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.epilog = f"{add(command)}\n{_CODES}"
        command.add_argument(
            "--traceback",
            action="store_true",
            help="after an error print the traceback too",
        )
        flags = [flag for action in command._actions for flag in action.option_strings]
        command.set_defaults(flags=flags)
    return parser


def _measure(parser: argparse.ArgumentParser) -> str:
    parser.add_argument("data", nargs="?", metavar="DATA", help=".npz file or folder")
    for name, what in (
        ("features", "features (N, d)"),
        ("labels", "labels (N,)"),
        ("W", "weight (K, d)"),
        ("b", "bias (K,)"),
    ):
        parser.add_argument(f"--{name}", metavar="FILE", help=f".npy file of the {what}")
    parser.add_argument(
        "--layers", action="store_true", help="measure each layer: arrays features/NAME"
    )
    parser.add_argument(
        "--convention",
        metavar="NAME",
        help="add the numbers of a paper by its own names, such as papyan2020",
    )
    _add_measuring(parser)
    _add_plot(parser)
    return _DATA + "\nExample: ncjax measure features.npz --plot=collapse.png\n"


def _compare(parser: argparse.ArgumentParser) -> str:
    parser.add_argument("first", metavar="DATA", help=".npz file or folder")
    parser.add_argument("second", metavar="DATA", help="the one to compare with it")
    _add_measuring(parser)
    return _DATA + "\nExample: ncjax compare epoch10.npz epoch100.npz\n"


def _certify(parser: argparse.ArgumentParser) -> str:
    parser.add_argument("data", metavar="DATA", help=".npz file or folder")
    parser.add_argument(
        "--multipliers",
        choices=("auto", "nnls", "softmax"),
        default="auto",
        help="nnls fits them to the direction, softmax reads them off the loss at this "
        "norm; auto (default) takes nnls for a small problem",
    )
    parser.add_argument(
        "--tol",
        type=_number(0, "a number that is not negative"),
        metavar="X",
        help="largest residual that counts as zero",
    )
    parser.add_argument(
        "--per-class",
        type=_integer(1),
        metavar="n",
        help="samples of each class, if DATA has features; the smallest class by default",
    )
    _add_json(parser)
    return (
        "DATA holds W (K, d) and H (K, n, d), or features (N, d), labels (N,), W and "
        "maybe b,\nof which the first n samples of each class are taken.\n"
        "\nExample: ncjax certify wh.npz\n"
    )


def _flow(parser: argparse.ArgumentParser) -> str:
    for name, kind, default, what in (
        ("num-classes", _integer(2), 4, "K, number of classes"),
        ("per-class", _integer(1), 3, "n, samples of each class"),
        ("dim", _integer(1), 8, "d, feature dimension"),
        (
            "log-t-max",
            _number(1, "a number above 1"),
            1000.0,
            "natural log of the last time",
        ),
        ("seeds", _integer(1), 4, "number of random starts"),
        ("seed", _integer(0, _LARGEST_SEED), 0, "seed of the starts"),
    ):
        parser.add_argument(
            f"--{name}",
            type=kind,
            default=default,
            metavar="N",
            help=f"{what}; {default:g} by default",
        )
    _add_json(parser)
    _add_plot(parser)
    return "Example: ncjax flow --num-classes=10 --dim=20 --plot=flow.png\n"


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--min-count",
        type=_integer(1),
        metavar="m",
        help="measure classes of at least m samples; without it every class needs one",
    )
    parser.add_argument(
        "--float64", action="store_true", help="compute in float64 instead of float32"
    )
    _add_json(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of a table; NaN is null"
    )


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plot",
        type=os.path.expanduser,
        metavar="FILE",
        help="write a figure: .png, .pdf or .svg",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the figure if it exists"
    )


def _integer(least: int, most: float = math.inf) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"expected an integer of at least {least}, got {text!r}"
            )
        if value > most:
            raise argparse.ArgumentTypeError(
                f"expected an integer of at most {most}, got {text!r}"
            )
        return value

    return convert


def _number(least: float, what: str) -> Callable[[str], float]:
    """Return a converter to numbers from `least` on, or above it if it is not 0."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or (least and value == least):
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
        return value

    return convert


def _unknown(argument: str, known: Sequence[str], command: str) -> str:
    nearest = _nearest(argument.partition("=")[0], known)
    return f"unknown argument {argument!r}{nearest}see ncjax {command} --help"


def _nearest(given: str, known: Sequence[str]) -> str:
    """Return a suggestion between two parts of a message."""
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}? " if near else "; "


_COMMANDS = {
    "measure": ("measure the collapse of features and a last layer", _measure),
    "compare": ("compare two sets of features, metric by metric", _compare),
    "certify": ("certify whether (W, H) is an optimal direction", _certify),
    "flow": ("follow the gradient flow of the layer-peeled model", _flow),
}
