"""The command line of every experiment: flags from a dataclass, errors in one line.

Only this module and `compilation` set `jax.config`.
"""

import ast
import dataclasses
import difflib
import errno
import inspect
import os
import shlex
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import flags, logging

from experiments._runs import compilation, processes, reading
from experiments._runs.errors import BadUse, RunFailed, first_line, is_out_of_memory
from experiments._runs.interruption import interrupt_on_signals
from experiments._runs.output import note

# Groups of flags.
MODEL, DATA, SEEDS, TIME = "Model", "Data", "Seeds", "Time and accuracy"
TRAINING, FOLDER, OUTPUT, MACHINE = "Training", "Run folder", "Output", "Machine"
# The help shows them in this order.
GROUPS = (MODEL, DATA, SEEDS, TIME, TRAINING, FOLDER, OUTPUT, MACHINE)
_TRACEBACK = "after an error or an interruption, print the traceback to stderr"
_NOTES = """\
Shown are the defaults. [no]: --flag is on, --noflag is off.
The path of what was written is the last line of stdout.
Exit codes: 0 done, 1 failed, 2 bad use, 130 interrupted.
Programs are kept for the next run; JAX_ENABLE_COMPILATION_CACHE=false keeps none."""
_FLAG_COLUMNS = 26  # columns that hold a flag and its default
_INTERRUPTION, _NO_READER = 130, 141  # exit codes of a shell for SIGINT and SIGPIPE
# Errors of a stream that nothing reads any more: a closed pipe, a closed terminal.
_UNREAD = (errno.EPIPE, errno.EIO)
_PATH = "path"  # in the metadata of a field: the separator of its paths, None for one path
_DEFINE: dict[Any, Callable[..., Any]] = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
    bool: flags.DEFINE_boolean,
}
_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false"}


def flag(default: Any, text: str, group: str) -> Any:
    """Return a dataclass field for a flag: default, line of help with its unit, group."""
    return dataclasses.field(default=default, metadata={"help": text, "group": group})


def path_flag(default: str, text: str, group: str, *, separator: str | None = None) -> Any:
    """Return a field for the flag of a path, or of several with `separator` between."""
    kind = {"help": text, "group": group, _PATH: separator}
    return dataclasses.field(default=default, metadata=kind)


class Settings:
    """Base of every `Config`: its paths hold the home directory in place of ~ and ~user."""

    def __post_init__(self):
        """Replace ~ and ~user at the start of each path.

        Raises:
          BadUse: there is no such user, or the home directory is unknown.
        """
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if _PATH in field.metadata:
                paths = _expanded(field, getattr(self, field.name))
                object.__setattr__(self, field.name, paths)


def _expanded(field: dataclasses.Field, text: str) -> str:
    """Return the path in `text`, or the paths, with every home directory written out."""
    separator = field.metadata[_PATH]
    paths = (
        [text] if separator is None else [part.strip() for part in text.split(separator)]
    )
    full = [os.path.expanduser(path) for path in paths]
    for path in full:
        if path.startswith("~"):
            raise BadUse(
                f"--{field.name}={text}: no home directory is known for "
                f"{path.partition('/')[0]!r}; a folder of that name is './{path}'"
            )
    return (separator or "").join(full)


@dataclasses.dataclass(frozen=True)
class SeveralProcesses(Settings):
    """Flags of experiments that several processes can share."""

    coordinator: str = flag(
        "", "host:port at which process 0 listens, if there are several", MACHINE
    )
    num_processes: int = flag(1, "processes that share the run", MACHINE)
    process_id: int = flag(0, "number of this process, from 0", MACHINE)
    local_device_ids: str = flag(
        "", "GPUs of this process, such as 0,1; if empty, all of its machine", MACHINE
    )
    process_timeout: float = flag(
        60.0, "seconds until a process that does not start or answer is lost", MACHINE
    )


def parse(config_class: type, argv: Sequence[str]):
    """Return the config that `argv` (program name first) specifies.

    Raises:
      absl.flags.Error: an unknown flag.
      BadUse: a value of the wrong type, or an argument that is no flag.
    """
    return _config(config_class, _flags(config_class), argv)


def _flags(config_class: type) -> flags.FlagValues:
    """Return the flags of an experiment, and --traceback.

    Each call makes a `FlagValues` of its own, so that experiments with flags of the same
    name can be imported together.
    """
    values = flags.FlagValues()
    flags.DEFINE_boolean("traceback", False, _TRACEBACK, flag_values=values)
    for field in dataclasses.fields(config_class):
        _DEFINE[field.type](
            field.name, field.default, field.metadata["help"], flag_values=values
        )
    return values


def _config(config_class: type, values: flags.FlagValues, argv: Sequence[str]):
    types = {field.name: field.type for field in dataclasses.fields(config_class)}
    try:
        arguments = values(list(argv))[1:]
    except flags.IllegalFlagValueError as error:
        raise _wrong_type(error, types) from None
    except flags.UnrecognizedFlagError as error:
        raise _with_suggestion(error, list(values)) from None
    if arguments:
        raise BadUse(f"expected flags such as --seed=1, got {' '.join(arguments)!r}")
    return config_class(**{name: values[name].value for name in types})


def _wrong_type(error: flags.Error, types: Mapping[str, Any]) -> BadUse:
    """Return an error that replaces absl's "flag --NAME=VALUE: REASON"."""
    text = str(error).removeprefix("flag --").removesuffix(f": {error.__context__}")
    name, _, value = text.partition("=")
    return BadUse(f"--{name} must be {_TYPE_NAMES[types.get(name, bool)]}, got {value!r}")


def _with_suggestion(
    error: flags.UnrecognizedFlagError, known: Sequence[str]
) -> flags.Error:
    """Return the error with the nearest flag, for `seds` too, where absl suggests none."""
    suggestions = difflib.get_close_matches(error.flagname, known, n=1, cutoff=0.75)
    if "Did you mean" in str(error) or not suggestions:
        return error
    return flags.UnrecognizedFlagError(error.flagname, suggestions=suggestions)


def usage(config_class: type, name: str) -> str:
    """Return the help: a summary, an example, the flags of each group with defaults."""
    summary, _, example = _docstring(config_class).partition("\n\n")
    lines = [summary, "", f"Usage:   python -m {name} [--flag=value ...]", example]
    fields = dataclasses.fields(config_class)
    for group in GROUPS:
        members = [field for field in fields if field.metadata["group"] == group]
        if members:
            lines += ["", group]
        for field in members:
            lines += _flag_lines(field.name, field.default, field.metadata["help"])
    lines += ["", "Any experiment", *_line("--help", "show this and do nothing else")]
    return "\n".join([*lines, *_line("--traceback", _TRACEBACK), "", _NOTES])


def _docstring(config_class: type) -> str:
    """Return the docstring as its source shows it: `python -OO` removes it elsewhere."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(config_class)))
    return ast.get_docstring(tree.body[0]) or ""  # type: ignore[arg-type]


def _flag_lines(name: str, default: Any, text: str) -> list[str]:
    if isinstance(default, bool):
        return _line(f"--[no]{name}", f"{text}; {'on' if default else 'off'} by default")
    default_text = (
        f"{default:g}" if isinstance(default, float) else shlex.quote(str(default))
    )
    return _line(f"--{name}={default_text}", text)


def _line(left: str, text: str) -> list[str]:
    """Return one line of help, or two if the left part leaves no room."""
    if len(left) < _FLAG_COLUMNS:
        return [f"  {left:<{_FLAG_COLUMNS}}{text}"]
    return [f"  {left}", f"  {'':<{_FLAG_COLUMNS}}{text}"]


def main(
    config_class: type, run: Callable[[Any], Any], name: str, *, computes: bool = True
) -> None:
    """Parse `sys.argv`, run, and exit: 0 done, 1 failed, 2 bad use, 130 interrupted.

    With `computes=False` JAX is not set up, so that a run works without its devices.
    If the reader of stdout or stderr has gone, as in `2>&1 | head`, exit with 141 and print
    nothing.
    """
    code = 0
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack a letter of the output
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    interrupt_on_signals()
    try:
        code = _main(config_class, run, name, sys.argv, computes)
    except OSError as error:
        code = _code_of(error)
    try:
        print(end="", flush=True)
    except OSError as error:
        # Otherwise Python flushes stdout once more at exit, and prints an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or _code_of(error)
    if code:
        os._exit(code)  # an ordinary exit crashes if XLA is still computing
    sys.exit(code)


def _code_of(error: OSError) -> int:
    """Return the exit code for a failed write to stdout or stderr."""
    return _NO_READER if error.errno in _UNREAD else _fail(error)


def _main(config_class, run, name, argv, computes=True) -> int:
    if any(argument in ("-h", "-help", "--help") for argument in argv[1:]):
        print(usage(config_class, name))
        return 0
    warnings.showwarning = lambda message, *_args, **_kwargs: note(f"warning: {message}")
    logging.set_verbosity(logging.ERROR)  # TFDS and Orbax print hints for developers
    values = _flags(config_class)
    try:
        config = _config(config_class, values, argv)
        if computes:
            set_up_jax(config)
        run(config)
        processes.leave()
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as raised:
        error = processes.on_error(raised)
        if values["traceback"].value:
            note("".join(traceback.format_exception(error)).removesuffix("\n"))
        return _INTERRUPTION if isinstance(error, KeyboardInterrupt) else _fail(error)
    return 0


def _fail(error: BaseException) -> int:
    """Print an error in one line and return its exit code."""
    message = " ".join(str(error).split())
    if isinstance(error, flags.UnrecognizedFlagError) and "Did you mean" not in message:
        message += "; --help lists the flags"
    if not isinstance(error, BadUse | RunFailed | flags.Error | OSError):
        first, kind = first_line(error), type(error).__name__
        message = f"{kind}: {first}" if first else kind
        if is_out_of_memory(error):
            message += "; free some memory, or make the run smaller"
        message += " (--traceback shows where)"
    note(f"error: {reading.shown(message, reading.MOST_OF_PATH)}")
    return 2 if isinstance(error, BadUse | flags.Error) else 1


def set_up_jax(config: Any = None) -> None:
    """Enable float64, split the CPU into devices, connect the processes of the run.

    Args:
      config: the flags; its fields `cpu_devices` and of `SeveralProcesses`, if it has them,
        describe the machine.

    Raises:
      BadUse: the settings contradict each other, or differ between the processes.
      RunFailed: a process did not start in time.
    """
    cpu_devices = getattr(config, "cpu_devices", 0)
    if cpu_devices < 0:
        raise BadUse(f"--cpu_devices must not be negative, got {cpu_devices}")
    if isinstance(config, SeveralProcesses):
        processes.check(config)
    jax.config.update("jax_enable_x64", True)
    # --traceback shows the frames of JAX too.
    jax.config.update("jax_traceback_filtering", "off")
    # 0 means one device per core, so that seeds run in parallel.
    jax.config.update("jax_num_cpu_devices", cpu_devices or cores())
    compilation.keep_programs()
    if isinstance(config, SeveralProcesses):
        processes.start(config)
    _check_platforms()


def _check_platforms() -> None:
    """Raise BadUse if JAX cannot start on the platforms that JAX_PLATFORMS names."""
    requested = os.environ.get("JAX_PLATFORMS")
    if not requested:
        return
    try:
        jax.devices()
    except Exception as error:
        jax.config.update("jax_platforms", None)
        found = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise BadUse(
            f"JAX_PLATFORMS={requested}: JAX finds no such device here, only {found}; "
            f"unset the variable, or set it to {found}"
        ) from error


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
