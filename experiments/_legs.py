"""Solve the flow of many seeds in legs, with progress, checkpoints and all devices."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ncjax
from experiments._runs import folders, memory
from experiments._runs.errors import BadUse
from experiments._runs.progress import tqdm
from ncjax import sizes
from ncjax.flow.methods import choose_solver
from ncjax.flow.solve import SUCCESS
from ncjax.peeled.margin_bound import value_or_bound

LEGS = 20

# Maps the states (T, ...) and the start of one seed to columns (T,).
Measure = Callable[[ncjax.Params, ncjax.Params], dict[str, jax.Array]]


class Progress(NamedTuple):
    """The content of a checkpoint after some legs."""

    legs_done: int
    state: ncjax.Params  # leading axis (S,)
    columns: dict[str, np.ndarray]  # (S, T so far) each
    steps: np.ndarray  # (legs, S, 3) steps, rejected steps, result code


def log_times(log_t_max: float, num_times: int) -> np.ndarray:
    """Return log t of times evenly spaced on the clock x = log(1 + log(1 + t)).

    `num_times` is rounded up to a multiple of the number of legs.
    """
    count = LEGS * math.ceil(num_times / LEGS)
    clock = np.linspace(0, np.log1p(np.logaddexp(0, log_t_max)), count + 1)[1:]
    u = np.expm1(clock)  # log(1 + t)
    times = u + np.log(-np.expm1(-u))
    times[-1] = log_t_max
    return times


def check_memory(
    seeds: int, num_classes: int, per_class: int, dim: int, num_times: int
) -> None:
    """Raise BadUse if the states of one leg exceed the memory.

    The devices share the seeds.
    """
    samples = num_classes * per_class
    numbers = (samples + num_classes) * dim + samples * num_classes
    times = 1 + num_times / LEGS
    flags = "--seeds, --num_classes, --per_class, --dim or --num_times"
    needed = 4.0 * seeds * times * numbers
    memory.check(needed, flags)
    available = sizes.device_memory(jax.local_devices())
    memory.check_devices(needed / jax.device_count(), flags, available)


def solve(
    starts: ncjax.Params,
    times: np.ndarray,
    measure: Measure,
    folder: Path,
    solver: str = "auto",
) -> tuple[dict[str, np.ndarray], np.ndarray, ncjax.Params]:
    """Flow from `starts` (S, ...) through `times` (T,), and measure at each.

    Go on from the checkpoint in `folder`, if there is one, and save one after each leg.

    Returns:
      Columns (S, T) by name; (legs, S, 3) solver steps, rejected steps, result codes; and
      the states (S, ...) at the end.
    """
    legs = times.reshape(LEGS, -1)
    progress = _load(folder) or _initial_progress(starts)
    if solver == "auto":  # decided here because a leg traces its times
        _, num_classes, dim = starts.W.shape
        solver = choose_solver(num_classes, dim, times[-1], starts.W.dtype)
    flow, measured = _compile(starts, measure, solver, step_limit(times[-1]))
    with tqdm(total=LEGS, initial=progress.legs_done, desc="flow", unit="leg") as bar:
        for leg in legs[progress.legs_done :]:
            done = progress.legs_done
            before = -math.inf if done == 0 else legs[done - 1][-1]
            solution = flow(progress.state, leg, before)
            progress = _extend(progress, solution, measured(solution.params, starts))
            _save(folder, progress)
            bar.set_postfix_str(f"log t = {leg[-1]:.4g}")
            bar.update()
            if (progress.steps[-1, :, 2] != SUCCESS).all():
                break  # every seed has failed; the columns keep their values so far
    return _padded(progress.columns, times.size), progress.steps, progress.state


def measure_collapse(states: ncjax.Params, start: ncjax.Params) -> dict[str, jax.Array]:
    """Measure one seed at (T,) times: a `Measure`."""

    def at_one_time(state):
        drift = ncjax.invariant_drift(state, start)
        return {
            "log_loss": ncjax.log_cross_entropy(state),
            "squared_norm": ncjax.squared_norm(state),
            "margin_ratio": ncjax.margin_ratio(state, value=value_or_bound(state)),
            "kkt_angle": ncjax.kkt_angle(state),
            "balance_drift": drift.balance,
            "classifier_sum_drift": drift.classifier_sum,
        } | ncjax.collapse_metrics(state)._asdict()

    return jax.vmap(at_one_time)(states)


def _padded(columns: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """Return columns (S, T), with NaN at the times that a stopped solve did not reach."""
    return {
        name: np.pad(
            values.astype(np.float64, copy=False),
            ((0, 0), (0, size - values.shape[1])),
            constant_values=np.nan,
        )
        for name, values in columns.items()
    }


def step_limit(log_t_max: float) -> int:
    """Return ten times the steps of an explicit solver; a seed that needs more fails."""
    return 1000 + math.ceil(min(4 * log_t_max, 2e9))


def _compile(starts: ncjax.Params, measure: Measure, solver: str, max_steps: int):
    """Compile the flow of one leg, on all devices, and its measurement, on one of them."""
    dtype = starts.W.dtype

    def leg(state, times, before):
        return ncjax.gradient_flow(
            state, times, start_log_time=before, solver=solver, max_steps=max_steps
        )

    many = by_seed(leg, starts.W.shape[0], num_shared=2)
    measured = on_one_device(jax.vmap(measure))

    def flow(states, times, before):
        return many(states, jnp.asarray(times, dtype), jnp.asarray(before, dtype))

    return flow, measured


def by_seed(one: Callable, seeds: int, num_shared: int = 0) -> Callable:
    """Compile a function of one seed for S seeds, each device with its own.

    Args:
      one: function of a state and of `num_shared` arrays that all seeds share.
      seeds: S, the size of the leading axis of the states.
      num_shared: number of the arrays.
    """
    count = max(c for c in range(1, jax.device_count() + 1) if seeds % c == 0)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:count]), ("seeds",))
    spread, shared = jax.sharding.PartitionSpec("seeds"), jax.sharding.PartitionSpec()
    # Each device solves its own seeds, at its own pace and without communication.
    compiled = jax.jit(
        jax.shard_map(
            jax.vmap(one, in_axes=(0, *[None] * num_shared)),
            mesh=mesh,
            in_specs=(spread, *[shared] * num_shared),
            out_specs=spread,
            check_vma=False,
        )
    )

    def of_all(states, *arrays):
        # Every call needs the same placement, or the second one compiles again.
        states = jax.device_put(states, jax.sharding.NamedSharding(mesh, spread))
        return compiled(states, *arrays)

    return of_all


def on_one_device(fn: Callable) -> Callable:
    """Compile a function for the first device.

    XLA's batched LAPACK calls can deadlock on several devices.
    """
    compiled = jax.jit(fn)
    return lambda *arrays: compiled(*jax.device_put(arrays, jax.devices()[0]))


def _initial_progress(starts: ncjax.Params) -> Progress:
    """Return the progress before the first leg."""
    return Progress(0, starts, {}, np.zeros((0, starts.W.shape[0], 3), np.int64))


def _extend(progress: Progress, solution: ncjax.FlowSolution, new) -> Progress:
    """Return the progress after one more leg."""
    new = jax.device_get(new)
    old = progress.columns or {name: part[:, :0] for name, part in new.items()}
    counts = (solution.num_steps, solution.num_rejected, solution.result)
    step_counts = np.stack(jax.device_get(counts), axis=-1).astype(np.int64)
    return Progress(
        legs_done=progress.legs_done + 1,
        state=solution.final,
        columns={k: np.concatenate([old[k], new[k]], axis=1) for k in new},
        steps=np.concatenate([progress.steps, step_counts[None]]),
    )


def _save(folder: Path, progress: Progress) -> None:
    W, H = jax.device_get(tuple(progress.state))
    columns = {f"column_{name}": values for name, values in progress.columns.items()}
    arrays = {"legs_done": np.asarray(progress.legs_done), "W": W, "H": H}
    folders.save_checkpoint(folder, arrays | {"steps": progress.steps} | columns)


def _load(folder: Path) -> Progress | None:
    stored = folders.load_checkpoint(folder)
    if stored is None:
        return None
    columns = {
        name.removeprefix("column_"): values
        for name, values in stored.items()
        if name.startswith("column_")
    }
    if not {"W", "H", "legs_done", "steps"} <= stored.keys():
        raise BadUse(f"{folder / folders.CHECKPOINT} is damaged: arrays are missing")
    state = ncjax.Params(jnp.asarray(stored["W"]), jnp.asarray(stored["H"]))
    return Progress(int(stored["legs_done"]), state, columns, stored["steps"])
