"""Time everything that grows with the square or the cube of the number of classes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import ncjax
from benchmarks import metrics
from benchmarks._accelerator_checks import Check, Finding, Setting
from benchmarks._accelerator_timing import costs, timed

FLOW_LOG_T, MAX_STEPS = 30.0, 4000
FEATURES = (
    metrics.Problem(num_classes=1000, dim=2048, samples=20_000),
    metrics.Problem(num_classes=10_000, dim=512, samples=30_000),
    metrics.Problem(num_classes=30_000, dim=512, samples=36_000),
)
TINY = (metrics.Problem(num_classes=20, dim=24, samples=60),)


def checks(setting: Setting) -> list[Check]:
    """Return the checks at many classes."""
    size = 20 if setting.tiny else 1000
    problems = TINY if setting.tiny else FEATURES
    return [
        *(
            Check(
                f"collapse_metrics_from_features, K={problem.num_classes} "
                f"d={problem.dim} N={problem.samples}",
                partial(_features, problem),
            )
            for problem in problems
        ),
        Check(f"collapse_metrics, K=d={size}", partial(_metrics, size)),
        Check(f"certificate, K=d={size}", partial(_certificate, size)),
        *(
            Check(f"flow, K=d={size} n=1, {dtype}", partial(_flow, size, dtype))
            for dtype in ("float32", "float64")
        ),
    ]


def _features(problem: metrics.Problem) -> Finding:
    arrays = tuple(map(jnp.asarray, metrics.draw(problem)))
    found, timing = timed(lambda: ncjax.collapse_metrics_from_features(*arrays))
    finite = bool(np.isfinite(np.asarray(found)).all())
    return Finding(finite, timing.seconds, "s", costs(timing))


def _metrics(size: int) -> Finding:
    point = ncjax.init_params(jax.random.key(0), size, 2, size)
    found, timing = timed(lambda: ncjax.collapse_metrics(point))
    finite = bool(np.isfinite(np.asarray(found)).all())
    return Finding(finite, timing.seconds, "s", costs(timing))


def _certificate(size: int) -> Finding:
    collapse = ncjax.block_saddle(1, size, 1, size)
    far = ncjax.Params(30 * collapse.W, 30 * collapse.H)
    found, timing = timed(lambda: ncjax.certificate(far))
    verdict = int(found.verdict)
    details = {"verdict": ncjax.VERDICTS[verdict], **costs(timing)}
    is_optimum = verdict == ncjax.separation.GLOBAL_OPTIMUM
    return Finding(is_optimum, timing.seconds, "s", details)


def _flow(size: int, dtype: str) -> Finding:
    start = ncjax.init_params(jax.random.key(0), size, 1, size, 0.1, jnp.dtype(dtype))
    run = jax.jit(
        lambda z: ncjax.gradient_flow(
            z, [FLOW_LOG_T], solver="explicit", max_steps=MAX_STEPS
        )
    )
    found, timing = timed(lambda: run(start), repeats=1)
    steps = int(found.num_steps)
    details = {
        "log_t": FLOW_LOG_T,
        "steps": steps,
        "ms_per_step": 1e3 * timing.seconds / max(steps, 1),
        "log_loss": found.log_loss[-1],
        **costs(timing),
    }
    return Finding(int(found.result) == 0, timing.seconds, "s", details)
