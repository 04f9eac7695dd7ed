"""Command line shared by the experiments: flags from a dataclass, errors in one line.

The only place that sets `jax.config`.
"""

import dataclasses
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags, logging

_DEFINE: dict[Any, Callable[..., Any]] = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
    bool: flags.DEFINE_boolean,
}


def flag(default: Any, text: str) -> Any:
    """A dataclass field that is a flag: its default and its line of help."""
    return dataclasses.field(default=default, metadata={"help": text})


def parse(config_class: type, argv: Sequence[str]):
    """The config that `argv` (program name first) asks for.

    Flags live in a `FlagValues` of their own, so that experiments with flags of the same
    name can be imported together.

    Raises:
      absl.flags.Error: an unknown flag or a value of the wrong type.
      ValueError: an argument that is no flag.
    """
    values = flags.FlagValues()
    fields = dataclasses.fields(config_class)
    for field in fields:
        _DEFINE[field.type](
            field.name, field.default, field.metadata["help"], flag_values=values
        )
    rest = values(list(argv))[1:]
    if rest:
        raise ValueError(f"expected flags such as --seed=1, got {' '.join(rest)!r}")
    return config_class(**{field.name: values[field.name].value for field in fields})


def usage(config_class: type, name: str) -> str:
    """Help text: what it does, an example, each flag with its default."""
    summary = inspect.getdoc(config_class) or ""
    lines = [summary, "", f"Usage: python -m {name} [--flag=value ...]", ""]
    for field in dataclasses.fields(config_class):
        default = field.default if field.default != "" else '""'
        left = f"  --{field.name}={default}".replace("=False", "")
        lines.append(f"{left:<26} {field.metadata['help']}")
    return "\n".join(lines)


def main(config_class: type, run: Callable[[Any], Any], name: str) -> None:
    """Parse `sys.argv`, run, and exit: 0 done, 1 failed, 2 bad use, 130 interrupted."""
    sys.exit(_main(config_class, run, name, sys.argv))


def _main(config_class, run, name, argv) -> int:
    if any(argument in ("-h", "--help") for argument in argv[1:]):
        print(usage(config_class, name))
        return 0
    warnings.showwarning = lambda message, *_args, **_kwargs: print(
        f"warning: {message}", file=sys.stderr
    )
    logging.set_verbosity(logging.ERROR)  # hints of TFDS and Orbax, none to the user
    try:
        config = parse(config_class, argv)
        set_up_jax(
            getattr(config, "cpu_devices", 0),
            getattr(config, "coordinator", ""),
            getattr(config, "num_processes", 1),
            getattr(config, "process_id", 0),
        )
        run(config)
    except (flags.Error, ValueError) as error:
        return _fail(error, 2)
    except (OSError, RuntimeError, MemoryError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130
    return 0


def _fail(error: Exception, code: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def set_up_jax(
    cpu_devices: int = 0, coordinator: str = "", num_processes: int = 1, process_id: int = 0
) -> None:
    """Float64 at hand, CPU devices, and the other processes of the run, if there are any.

    Args:
      cpu_devices: what JAX is to split the CPU into; 0 for one for each core, so that
        seeds can share them.
      coordinator: host:port of process 0, where there are several.
      num_processes: of the whole run.
      process_id: of this one, from 0.

    Raises:
      ValueError: the settings do not fit together.
    """
    if cpu_devices < 0:
        raise ValueError(f"--cpu_devices must not be negative, got {cpu_devices}")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id must lie in [0, {num_processes}), the number of processes, got "
            f"{process_id}"
        )
    if (num_processes > 1) != bool(coordinator):
        raise ValueError("--coordinator=HOST:PORT and --num_processes go together")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", cpu_devices or cores())
    if num_processes > 1:
        jax.distributed.initialize(coordinator, num_processes, process_id)


def cores() -> int:
    """CPU cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
