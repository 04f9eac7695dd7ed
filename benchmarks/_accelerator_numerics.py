"""The numbers of the accelerator against the numbers of the CPU of the same machine."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ncjax
from benchmarks._accelerator_checks import Check, Finding, Setting
from ncjax.networks import convolution


class FlowCase(NamedTuple):
    """A flow, and the bound of the relative error of its log loss."""

    dtype: str
    solver: str
    log_t: float
    bound: float


FLOWS = (
    FlowCase("float64", "explicit", 1000.0, 1e-6),
    FlowCase("float64", "stabilised", 3000.0, 1e-6),
    FlowCase("float64", "implicit", 1e6, 1e-6),
    FlowCase("float32", "explicit", 1000.0, 1e-2),
)
TINY_FLOWS = (FlowCase("float64", "explicit", 10.0, 1e-6),)
FEATURES = {"float64": 1e-9, "float32": 1e-3}
# Relative to the largest entry. A GPU multiplies float32 in TF32, of 10 bits.
LAYERS = {"float32": 2e-2, "bfloat16": 1e-1}


def checks(setting: Setting) -> list[Check]:
    """Return a check for each solver, dtype and kind of computation."""
    flows = TINY_FLOWS if setting.tiny else FLOWS
    return [
        *(
            Check(f"flow, {case.solver}, {case.dtype}", partial(_flow, case))
            for case in flows
        ),
        Check("flow, twice the same bytes", partial(_again, flows[0].log_t)),
        *(
            Check(f"{name}, {dtype}", partial(_features, measure, dtype, bound))
            for name, measure in _MEASURES.items()
            for dtype, bound in FEATURES.items()
        ),
        *(
            Check(f"certificate, {name}", partial(_certificate, name))
            for name in ("softmax", "nnls")
        ),
        *(
            Check(f"hessian_eig, {name}", partial(_hessian, name))
            for name in ("dense", "lanczos")
        ),
        *(
            Check(f"{name}, gradients, {dtype}", partial(_layer, fn, dtype, bound))
            for name, fn in _LAYERS.items()
            for dtype, bound in LAYERS.items()
        ),
    ]


def _on_both(fn: Callable, *args) -> tuple[Any, Any]:
    """Return `fn(*args)` of the default device and of the CPU, as NumPy arrays."""
    here = jax.device_get(fn(*args))
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return here, jax.device_get(fn(*jax.device_put(args, cpu)))


def _gap(here, there) -> float:
    """Return the largest difference over the largest entry; NaN if only one is finite."""
    here, there = (np.asarray(x, np.float64) for x in (here, there))
    if not np.array_equal(np.isfinite(here), np.isfinite(there)):
        return float("nan")
    finite = np.isfinite(there)
    if not finite.any():
        return 0.0
    scale = max(float(np.abs(there[finite]).max()), np.finfo(float).tiny)
    return float(np.abs(here - there)[finite].max()) / scale


def _worst(here, there) -> tuple[str, float]:
    """Return the field of two tuples of one type that differs most, and its gap."""
    gaps = {name: _gap(x, getattr(there, name)) for name, x in here._asdict().items()}
    name = max(gaps, key=lambda name: (np.isnan(gaps[name]), gaps[name]))
    return name, gaps[name]


def _below(gap: float, bound: float, **details) -> Finding:
    return Finding(gap < bound, gap, "relative", {"bound": bound, **details})


def _flow(case: FlowCase) -> Finding:
    start = ncjax.init_params(jax.random.key(0), 4, 3, 6, 0.1, jnp.dtype(case.dtype))
    times = np.geomspace(1.0, case.log_t, 4)
    here, there = _on_both(partial(_solve, times=times, solver=case.solver), start)
    gap = _gap(here.log_loss, there.log_loss)
    finding = _below(gap, case.bound, steps=here.num_steps, result=here.result)
    return finding._replace(ok=finding.ok and int(here.result) == 0)


def _solve(start, times, solver: str):
    return ncjax.gradient_flow(start, times, solver=solver)


def _again(log_t: float) -> Finding:
    keys = jax.random.split(jax.random.key(0), 8)
    starts = jax.vmap(lambda key: ncjax.init_params(key, 4, 3, 6))(keys)
    run = jax.jit(jax.vmap(lambda start: _solve(start, [log_t], "explicit").final))
    first, second = (jax.device_get(run(starts)) for _ in range(2))
    differing = sum(int(np.sum(x != y)) for x, y in zip(first, second, strict=True))
    return Finding(differing == 0, differing, "numbers differ")


def _features(measure: Callable, dtype: str, bound: float) -> Finding:
    rng = np.random.default_rng(0)
    means = rng.normal(size=(10, 64)).astype(dtype)
    labels = np.repeat(np.arange(10, dtype=np.int32), 50)
    noise = rng.normal(size=(len(labels), 64)).astype(dtype)
    features = means[labels] + np.asarray(0.05, dtype) * noise
    fn = jax.jit(lambda features, W: measure(features, jnp.asarray(labels), W))
    name, gap = _worst(*_on_both(fn, jnp.asarray(features), jnp.asarray(means)))
    return _below(gap, bound, worst=name)


_MEASURES: dict[str, Callable] = {
    "collapse_metrics_from_features": ncjax.collapse_metrics_from_features,
    "last_layer": ncjax.last_layer,
}


def _far_saddle() -> ncjax.Params:
    """Return a saddle of two blocks, far from the origin: its least eigenvalue is -1/4."""
    saddle = ncjax.block_saddle(2, 2, 1, 4)
    return ncjax.Params(30 * saddle.W, 30 * saddle.H)


def _certificate(multipliers: str) -> Finding:
    here, there = _on_both(
        lambda point: ncjax.certificate(point, multipliers=multipliers), _far_saddle()
    )
    verdicts = [ncjax.VERDICTS[int(found.verdict)] for found in (here, there)]
    gap = _gap(here.sigma_max, there.sigma_max)
    finding = _below(gap, 1e-9, verdict=verdicts[0], verdict_cpu=verdicts[1])
    return finding._replace(ok=finding.ok and verdicts[0] == verdicts[1])


def _hessian(method: str) -> Finding:
    found = ncjax.hessian_eig(
        ncjax.log_cross_entropy, _far_saddle(), k=2, sphere=True, method=method
    )
    error = float(np.abs(np.asarray(found.eigenvalues) + 0.25).max())
    return Finding(error < 1e-8, error, "from -1/4", {"hvps": found.num_hvps})


def _convolve(x, kernel):
    return convolution.convolve(x, kernel, 1, 1)


def _pool(x, _kernel):
    return convolution.max_pool(x, 3, 2, 1)


_LAYERS = {"convolution": _convolve, "pooling": _pool}


def _layer(fn: Callable, dtype: str, bound: float) -> Finding:
    keys = jax.random.split(jax.random.key(1))
    x = jax.random.normal(keys[0], (8, 16, 16, 32), jnp.dtype(dtype))
    kernel = jax.random.normal(keys[1], (3, 3, 32, 32), jnp.dtype(dtype)) / 17

    def loss(x, kernel):
        return jnp.sum(jnp.sin(fn(x, kernel).astype(jnp.float32)))

    here, there = _on_both(jax.jit(jax.grad(loss, (0, 1))), x, kernel)
    gaps = [_gap(a, b) for a, b in zip(here, there, strict=True)]
    return _below(float(np.max(gaps)), bound)
