"""Values that a solve keeps at the T saved times, observed during the solve or after."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import diffrax
import jax
import jax.numpy as jnp

from ncjax.flow import invariants
from ncjax.flow.clock import Loss, unscaled
from ncjax.flow.methods import Finish
from ncjax.types import Array, DeepParams, Params


class Saved(NamedTuple):
    """Values at the saved times; rows of times that were not reached are arbitrary."""

    drift: invariants.InvariantDrift  # (T,) of the states that the solver interpolated
    observed: Any  # (T, ...) values of `observe`; integers may be floats
    final: Params | DeepParams  # state at the last time


class Plan(NamedTuple):
    """Instructions for diffrax to save, and a function that reads its solution."""

    saveat: diffrax.SaveAt
    read: Callable[[diffrax.Solution], Saved]


def plan(
    observe,
    initial: Params | DeepParams,
    x_save: Array,
    x_start: Array,
    finish: Finish | None,
    rtol,
    atol,
    loss: Loss,
) -> Plan:
    """Return the plan for saving at `x_save` (T,); it depends on the method's `finish`.

    Args:
      observe: function of a state Z, whose value (any pytree of arrays) is kept.
      initial: state Z from which the drift of the invariants is measured.
      x_save: (T,) times on the clock x.
      x_start: start of the solve on the clock x.
      finish: improvement of the saved states by the method, None for none.
      rtol: relative tolerance of a step.
      atol: absolute tolerance of a step.
      loss: loss of the flow.
    """
    chex.assert_rank(x_save, 1)
    if finish is None:
        return _observe_while_solving(observe, initial, x_save)
    improve = partial(finish.improve, rtol=rtol, atol=atol, initial=initial, loss=loss)
    x_before = jnp.maximum(x_save - finish.lead, x_start)
    return _observe_when_finished(observe, initial, x_save, x_before, improve)


def _observe_while_solving(observe, initial: Params | DeepParams, x_save: Array) -> Plan:
    """Keep `observe(Z)` alone, so that no state needs memory."""

    def save(x, scaled, _args):
        state = unscaled(x, scaled)
        drift = invariants.drift(state, initial)
        return drift, as_floats(observe(state), x.dtype)

    def read(solution):
        drift, observed = first_rows(solution.ys[0], x_save.size)
        last = jax.tree.map(lambda leaf: leaf[-1], solution.ys[1])
        return Saved(drift, observed, final=unscaled(x_save[-1], last))

    end = diffrax.SubSaveAt(t1=True)
    return Plan(diffrax.SaveAt(subs=[at_times(x_save, save), end]), read)


def _observe_when_finished(
    observe, initial: Params | DeepParams, x_save: Array, x_before: Array, improve
) -> Plan:
    """Keep the states, and observe them once the solve is over and they are improved."""

    def save(x, scaled, _args):
        return invariants.drift(unscaled(x, scaled), initial), scaled

    def read(solution):
        drift, interpolated = first_rows(solution.ys[0], x_save.size)
        kept = (x_before, solution.ys[1], x_save, interpolated)
        states = jax.lax.map(lambda each: improve(*each), kept)
        final = jax.tree.map(lambda leaf: leaf[-1], states)
        return Saved(drift, jax.lax.map(observe, states), final)

    before = diffrax.SubSaveAt(ts=x_before, fn=lambda _x, scaled, _args: scaled)
    return Plan(diffrax.SaveAt(subs=[at_times(x_save, save), before]), read)


def at_times(x_save: Array, save) -> diffrax.SubSaveAt:
    """Save at each time; a single time twice.

    diffrax saves in an inner loop over the times that a step has passed. With a single
    time every trip of that loop computes the same, so XLA moves the computation out of
    it, and `save` runs at every step. With a second time it depends on the index and
    runs only when a time is passed.
    """
    ts = jnp.repeat(x_save, 2) if x_save.size == 1 else x_save
    return diffrax.SubSaveAt(ts=ts, fn=save)


def first_rows(saved, size: int):
    """Return the first `size` rows, without the repetition of a single time."""
    return jax.tree.map(lambda leaf: leaf[:size], saved)


def as_floats(observed, dtype):
    """Turn integers into floats: diffrax fills rows with infinity, which integers lack."""
    return jax.tree.map(
        lambda leaf: (
            leaf if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf.astype(dtype)
        ),
        observed,
    )
