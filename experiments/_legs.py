"""Solve the flow of many seeds in legs, with progress and checkpoints."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ncjax
from experiments._runs import folders, memory, processes
from experiments._runs.errors import BadUse
from experiments._runs.progress import tqdm
from experiments._seeds import Division, measurement
from ncjax import sizes
from ncjax.flow.methods import choose_solver
from ncjax.flow.solve import SUCCESS
from ncjax.peeled.margin_bound import value_or_bound

LEGS = 20
# Names in a checkpoint: of the steps, and before the name of a column.
_STEPS, _COLUMN = "steps", "column_"

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
    Several processes share the seeds, and return the same results.

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
    with tqdm(
        total=LEGS,
        initial=progress.legs_done,
        desc="flow",
        unit="leg",
        disable=not processes.is_first(),
    ) as bar:
        for leg in legs[progress.legs_done :]:
            done = progress.legs_done
            before = -math.inf if done == 0 else legs[done - 1][-1]
            solution = flow(progress.state, leg, before)
            progress = _extend(progress, solution, measured(solution.params, starts))
            if processes.is_first():
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
    """Compile the flow of one leg from all states, and its measurement.

    Both return the results of the seeds of this process.
    """
    dtype = starts.W.dtype

    def leg(state, times, before):
        return ncjax.gradient_flow(
            state, times, start_log_time=before, solver=solver, max_steps=max_steps
        )

    division = Division(starts.W.shape[0])
    many = division.compiled(leg, num_shared=2)
    of_placed = measurement(jax.vmap(measure))

    def flow(states, times, before):
        return many(states, jnp.asarray(times, dtype), jnp.asarray(before, dtype))

    def measured(states, starts):
        return of_placed(states, division.place(starts))

    return flow, measured


def _initial_progress(starts: ncjax.Params) -> Progress:
    """Return the progress before the first leg."""
    return Progress(0, starts, {}, np.zeros((0, starts.W.shape[0], 3), np.int64))


def _extend(progress: Progress, solution: ncjax.FlowSolution, new) -> Progress:
    """Return the progress after one more leg, from what this process has computed."""
    counts = (solution.num_steps, solution.num_rejected, solution.result)
    steps = np.stack(jax.device_get(counts), axis=-1).astype(np.int64)
    results = {_STEPS: steps, **solution.final._asdict()} | _named(new)
    found = Division(progress.steps.shape[1]).collect(results)
    added = {name: found[_COLUMN + name] for name in new}
    old = progress.columns or {name: part[:, :0] for name, part in added.items()}
    return Progress(
        legs_done=progress.legs_done + 1,
        state=ncjax.Params(jnp.asarray(found["W"]), jnp.asarray(found["H"])),
        columns={k: np.concatenate([old[k], added[k]], axis=1) for k in added},
        steps=np.concatenate([progress.steps, found[_STEPS][None]]),
    )


def _named(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return columns under the names that they have beside other arrays."""
    return {f"{_COLUMN}{name}": values for name, values in columns.items()}


def _save(folder: Path, progress: Progress) -> None:
    W, H = jax.device_get(tuple(progress.state))
    arrays = {"legs_done": np.asarray(progress.legs_done), "W": W, "H": H}
    arrays |= {_STEPS: progress.steps} | _named(progress.columns)
    folders.save_checkpoint(folder, arrays)


def _load(folder: Path) -> Progress | None:
    """Return the progress in the folder, which the first process reads for all."""
    stored = folders.load_checkpoint(folder) if processes.is_first() else None
    stored = processes.exchange_arrays(stored or {})[0]
    if not stored:
        return None
    columns = {
        name.removeprefix(_COLUMN): values
        for name, values in stored.items()
        if name.startswith(_COLUMN)
    }
    if not {"W", "H", "legs_done", _STEPS} <= stored.keys():
        raise BadUse(f"{folder / folders.CHECKPOINT} is damaged: arrays are missing")
    state = ncjax.Params(jnp.asarray(stored["W"]), jnp.asarray(stored["H"]))
    return Progress(int(stored["legs_done"]), state, columns, stored[_STEPS])
