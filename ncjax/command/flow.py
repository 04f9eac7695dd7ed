"""`ncjax flow`: the gradient flow of the layer-peeled model from random starts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ncjax import sizes
from ncjax.command import device, output
from ncjax.command.output import BadUse
from ncjax.flow import FlowSolution, gradient_flow
from ncjax.flow.methods import choose_solver
from ncjax.flow.solve import SUCCESS
from ncjax.metrics import collapse_metrics
from ncjax.peeled import init_params, kkt_angle, margin_ratio
from ncjax.peeled.margin_bound import value_or_bound
from ncjax.types import Params

_TIMES = 60
_SCALE = 0.1  # standard deviation of the entries at t = 0
_PRINTED = (
    "within_class_variation",
    "within_class_quotient",
    "mean_norm_variation",
    "mean_cosine_deviation",
    "centred_classifier_cosine_deviation",
    "centred_self_duality",
    "self_duality",
    "kkt_angle",
    "margin_deficit",
)


def run(options) -> None:
    """Solve the flow and print the median of each metric at the last time."""
    output.check_plot(options.plot, options.overwrite)
    _check_memory(options)
    with device.ready(float64=True):
        log_times = _log_times(options.log_t_max)
        starts = _starts(options)
        solution, columns = _solve(starts, log_times)
        reached = np.asarray(solution.result) == SUCCESS
        if not reached.any():
            raise RuntimeError(f"no seed reached log t = {options.log_t_max:g}")
        if not reached.all():
            output.note(f"{(~reached).sum()} of {options.seeds} seeds failed")
        last = {name: values[reached, -1] for name, values in columns.items()}
        if options.json:
            output.show_json(_as_dict(options, log_times, columns, last))
        else:
            print(_table(options, last, int(np.median(solution.num_steps))))
        if options.plot:
            from ncjax import plotting

            panels = plotting.collapse_panels(columns)
            figure = plotting.figure_over_log_log_t(log_times, panels)
            output.save_plot(figure, options.plot)


def _check_memory(options) -> None:
    """Raise BadUse if the states at all times and one matrix of margins do not fit."""
    state = (1 + options.per_class) * options.dim
    margins = options.per_class * options.num_classes
    needed = 8 * options.seeds * options.num_classes * (_TIMES * state + margins)
    installed = sizes.host_memory()
    if needed > installed:
        raise BadUse(
            f"this flow needs at least {needed / 1e9:.3g} GB of memory, and the machine "
            f"has {installed / 1e9:.3g} GB: give smaller --num-classes, --per-class, "
            "--dim or --seeds"
        )


def _log_times(log_t_max: float) -> np.ndarray:
    """Return log t of times evenly spaced on the clock x = log(1 + log(1 + t))."""
    clock = np.linspace(0, np.log1p(np.logaddexp(0, log_t_max)), _TIMES + 1)[1:]
    u = np.expm1(clock)  # log(1 + t)
    times = u + np.log(-np.expm1(-u))
    times[-1] = log_t_max
    return times


def _starts(options) -> Params:
    """Return one start per seed, with a leading axis (seeds,)."""

    def start(key):
        return init_params(
            key, options.num_classes, options.per_class, options.dim, _SCALE, jnp.float64
        )

    return jax.vmap(start)(jax.random.split(jax.random.key(options.seed), options.seeds))


def _solve(starts: Params, log_times: np.ndarray) -> tuple[FlowSolution, dict]:
    """Return the solution (S, ...) and the columns (S, T) by name."""
    _, num_classes, dim = starts.W.shape
    solver = choose_solver(num_classes, dim, log_times[-1], starts.W.dtype)

    @jax.jit
    def solve(starts):
        return jax.vmap(partial(gradient_flow, log_times=log_times, solver=solver))(starts)

    solution = solve(starts)
    columns = jax.jit(jax.vmap(jax.vmap(_measured)))(solution.params)
    return solution, {name: np.asarray(values) for name, values in columns.items()}


def _measured(params: Params) -> dict[str, jax.Array]:
    return collapse_metrics(params)._asdict() | {
        "kkt_angle": kkt_angle(params),
        "margin_deficit": 1 - margin_ratio(params, value=value_or_bound(params)),
    }


def _as_dict(options, log_times, columns, last) -> dict:
    names = ("num_classes", "per_class", "dim", "log_t_max", "seeds", "seed")
    return {
        "settings": {name: getattr(options, name) for name in names},
        "final": {name: float(np.median(values)) for name, values in last.items()},
        "log_times": log_times.tolist(),
        "median": {k: np.nanmedian(v, axis=0).tolist() for k, v in columns.items()},
    }


def _table(options, last: dict[str, np.ndarray], steps: int) -> str:
    lines = [
        f"{options.seeds} seeds, K={options.num_classes} n={options.per_class} "
        f"d={options.dim}, float64, log t = {options.log_t_max:g}, {steps} steps",
        "",
        f"{'':<37}{'median':>11}{'least':>11}{'largest':>11}",
    ]
    for name in _PRINTED:
        numbers = np.median(last[name]), last[name].min(), last[name].max()
        lines.append(f"{name:<37}" + "".join(f"{x:>11.3e}" for x in numbers))
    lines += ["", _verdict(options, last)]
    return "\n".join(lines)


def _verdict(options, last: dict[str, np.ndarray]) -> str:
    if options.dim < options.num_classes - 1:
        return (
            f"No simplex of {options.num_classes} classes fits into {options.dim} "
            "dimensions, so the theory predicts no limit of the angles."
        )
    deficit = float(np.median(last["margin_deficit"]))
    return (
        f"The least margin is a share of {deficit:.2g} below the largest possible one at "
        "this norm (median): the theory predicts 0 in the limit, at neural collapse."
    )
