"""Check every statement of the theory: print a line each, with number and verdict."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ncjax
from experiments import _deep_checks, _fits, _legs, _neighbours_checks, _saddles
from experiments._runs import cli, files, folders, page, precision
from experiments._runs.errors import BadUse, RunFailed
from experiments._runs.progress import tqdm
from experiments._statements import NCJAX, Statement, below

NAME = "theorems"
OUTPUTS = (f"{NAME}.csv", f"{NAME}.md")
K, N, D = 4, 3, 6
OPTIMUM = (K - 1) * N**0.5
TIMES = np.concatenate([[5.0, 10.0, 30.0, 100.0, 300.0], np.geomspace(1e3, 1e4, 12)])
SADDLES = [
    _saddles.Block(2, 2, 1, 4),
    _saddles.Block(3, 2, 1, 6),
    _saddles.Block(2, 2, 3, 4),
    _saddles.Block(2, 3, 2, 8),
]
COLLAPSE = _saddles.Block(1, K, N, D)
SCALE = 30.0


@dataclasses.dataclass(frozen=True)
class Config(cli.Settings):
    """Check every statement of the theory, in less than four minutes on two cores.

    Example: python -m experiments.theorems
    """

    seeds: int = cli.flag(8, "random starts of the flow", cli.SEEDS)
    seed: int = cli.flag(0, "seed of all random starts", cli.SEEDS)
    workdir: str = cli.path_flag(
        "", f"run folder; if empty, a new one under runs/{NAME}", cli.FOLDER
    )
    overwrite: bool = cli.flag(False, "replace the run that workdir holds", cli.FOLDER)


def run(config: Config) -> Path:
    """Check the statements, print a line each, and return the run folder.

    Write theorems.csv, theorems.md and summary.json. This needs `jax_enable_x64`.

    Raises:
      BadUse: a setting is out of range or the folder cannot be used.
      OSError: a file cannot be written.
      RunFailed: a statement failed.
    """
    if config.seeds < 1:
        raise BadUse(f"--seeds must be at least 1, got {config.seeds}")
    if not 0 <= config.seed < 2**63:
        raise BadUse(f"--seed must lie in [0, 2**63), got {config.seed}")
    precision.check_float64()
    _legs.check_memory(config.seeds, K, N, D, TIMES.size)
    with folders.open_config(config, NAME, OUTPUTS) as (folder, _):
        _run(config, folder)
    return folder


def _run(config: Config, folder: Path) -> None:
    """Do the run in its folder."""
    start = time.perf_counter()
    flow = _flows(config)
    with tqdm(CHECKS, desc="theorems") as checks:
        results = [check(flow) for check in checks]
    rows = [entry._asdict() for entry in results]
    files.write_table(folder / NAME, rows)
    seconds = round(time.perf_counter() - start, 1)
    summary = {"seconds": seconds, "statements": rows} | folders.provenance()
    folders.write_summary(folder, summary, OUTPUTS)
    print("\n".join(_line(entry) for entry in results))
    failed = [entry.statement for entry in results if not entry.passed]
    print(f"{len(results) - len(failed)} of {len(results)} hold, {seconds} s")
    if failed:
        raise RunFailed(f"{len(failed)} statements failed: {'; '.join(failed)}")


def _line(entry: Statement) -> str:
    """Return the printed line of one statement."""
    verdict = "pass" if entry.passed else "FAIL"
    return (
        f"{verdict}  {entry.source:<16} {entry.statement}; {entry.on}: "
        f"{entry.number:.3g} (bound {entry.bound:.3g})"
    )


def _flows(config: Config) -> ncjax.FlowSolution:
    """Solve flows from random starts; leading axes (S, T)."""

    def one(key):
        start = ncjax.init_params(key, K, N, D)
        return ncjax.gradient_flow(start, TIMES, rtol=1e-9, atol=1e-9)

    keys = jax.random.split(jax.random.key(config.seed), config.seeds)
    return jax.jit(jax.vmap(one))(keys)


def _along(flow: ncjax.FlowSolution, fn: Callable):
    """Evaluate `fn` of the state at every seed and time, (S, T)."""
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(jax.vmap(fn)))(flow.params))


def _flow_setting(flow: ncjax.FlowSolution) -> str:
    return f"{flow.log_loss.shape[0]} flows, K={K} n={N} d={D}, to log t = {TIMES[-1]:g}"


def _definition_2_1(_flow) -> Statement:
    etf = np.asarray(ncjax.simplex_etf(K, D, jax.random.key(0)))
    gram = K / (K - 1) * (np.eye(K) - 1 / K)
    error = np.abs(etf @ etf.T - gram).max()
    return below("Definition 2.1", "Gram matrix of the simplex ETF", f"K={K}", error, 1e-14)


def _theorem_3_1_bound(flow) -> Statement:
    keys = jax.random.split(jax.random.key(1), 2000)

    def ratio(key):
        return ncjax.margin_ratio(ncjax.init_params(key, K, N, D, 1.0))

    largest = max(jax.vmap(ratio)(keys).max(), _along(flow, ncjax.margin_ratio).max())
    return below(
        "Theorem 3.1",
        "margin ratio is at most 1",
        f"2000 random points and {_flow_setting(flow)}",
        largest,
        1.0,
    )


def _theorem_3_1_equality(_flow) -> Statement:
    gap = abs(float(ncjax.margin_ratio(ncjax.solve_separation((N,) * K, D).params)) - 1)
    return below("Theorem 3.1", "equality at collapse", f"K={K} n={N} d={D}", gap, 1e-12)


def _separation_value(_flow) -> Statement:
    solution = ncjax.solve_separation((N,) * K, D).params
    gap = abs(float(ncjax.squared_norm(solution)) / 2 - OPTIMUM)
    gap = max(gap, abs(float(ncjax.certificate(solution).gap)))
    return below(
        "(P2)", "optimal value (K-1)√n, duality gap 0", f"K={K} n={N} d={D}", gap, 1e-10
    )


def _separation_minimiser(_flow) -> Statement:
    metrics = ncjax.collapse_metrics(ncjax.solve_separation((N,) * K, D).params)._asdict()
    worst = max(float(v) for k, v in metrics.items() if k != "accuracy")
    return below(
        "Theorem 3.1", "its minimiser is neural collapse", "NC1 to NC4", worst, 1e-7
    )


def _theorem_3_2_loss(flow) -> Statement:
    highest = np.asarray(flow.log_loss)[:, 1:].max()
    return below(
        "Theorem 3.2",
        "log L falls below log log 2",
        _flow_setting(flow),
        highest,
        np.log(np.log(2)),
    )


def _theorem_3_2_kkt(flow) -> Statement:
    residual = _along(flow, lambda p: ncjax.kkt(p).stationarity)[:, -1].max()
    return below(
        "Theorem 3.2", "KKT residual tends to 0", _flow_setting(flow), residual, 0.02
    )


def _theorem_3_2_alignment(flow) -> Statement:
    angle = _along(flow, ncjax.kkt_angle)
    return below(
        "Theorem 3.2",
        "1 - beta tends to 0",
        _flow_setting(flow),
        angle[:, -1].max() ** 2 / 2,
        1e-4,
    )


def _corollary_norm(flow) -> Statement:
    late = TIMES >= 100
    ratio = _along(flow, ncjax.squared_norm)[:, late] / TIMES[late]
    return below(
        "Corollary",
        "|Z|² = Θ(log t): max/min of the quotient, log t ≥ 100",
        _flow_setting(flow),
        ratio.max() / ratio.min(),
        1.2,
    )


def _corollary_loss(flow) -> Statement:
    late = TIMES >= 100
    product = _loss_product(flow)[:, late]
    return below(
        "Corollary",
        "L = Θ(1/(t log t)): max/min of the product, log t ≥ 100",
        _flow_setting(flow),
        product.max() / product.min(),
        1.2,
    )


def _loss_product(flow) -> np.ndarray:
    """Return the product t L log t, (S, T)."""
    return np.exp(np.asarray(flow.log_loss) + TIMES + np.log(TIMES))


def _example_3_1(_flow) -> Statement:
    block = _saddles.Block(2, 2, 1, 4)
    residual = ncjax.kkt(block.params(SCALE)).stationarity
    return below(
        "Example 3.1", "a KKT point that is not collapsed", "K=4 n=1 d=4", residual, 1e-10
    )


def _definition_3_1(_flow) -> Statement:
    block = SADDLES[1]
    params, unstable = block.params(SCALE), _saddles.unstable_space(block)
    products = sum(
        jnp.tensordot(u, z, z.ndim) for u, z in zip(unstable, params, strict=True)
    )
    worst = jnp.abs(products).max() / jnp.sqrt(ncjax.squared_norm(params))
    return below(
        "Definition 3.1",
        "unstable directions are tangent to the sphere",
        str(block),
        worst,
        1e-12,
    )


def _theorem_3_3_saddles(_flow) -> Statement:
    worst = max(float(_least_eigenvalues(block, 1)[0]) for block in SADDLES)
    return below(
        "Theorem 3.3",
        "strict descent at KKT directions not collapsed",
        _saddle_setting(),
        worst,
        -0.01,
    )


def _theorem_3_3_minimiser(_flow) -> Statement:
    least = float(_least_eigenvalues(COLLAPSE, 1)[0])
    return below(
        "Theorem 3.3",
        "no descent at collapse: minus the least eigenvalue",
        _saddle_setting([COLLAPSE]),
        -least,
        1e-10,
    )


def _clock(_flow) -> Statement:
    """Compare W[0, 0] at t = 1e5 with the raw equation, solved by another program."""
    k, j = np.arange(4)[:, None], np.arange(6)[None]
    W = 0.3 * np.sin(1 + 3 * k + 7 * j)
    k, i, j = np.arange(4)[:, None, None], np.arange(3)[None, :, None], np.arange(6)
    H = 0.3 * np.cos(2 + 5 * k + 11 * i + 13 * j)
    start = ncjax.Params(jnp.asarray(W), jnp.asarray(H))
    final = ncjax.gradient_flow(start, [np.log(1e5)], rtol=1e-11, atol=1e-11).final
    error = abs(float(final.W[0, 0]) / 3.18763475558 - 1)
    return below(
        NCJAX, "the clock log(1 + log(1 + t)) solves the raw flow", "t = 1e5", error, 1e-9
    )


def _invariants(flow) -> Statement:
    drift = max(np.asarray(part).max() for part in flow.drift)
    return below(NCJAX, "WᵀW - Σhhᵀ and Σw are conserved", _flow_setting(flow), drift, 1e-7)


def _sharp_norm(flow) -> Statement:
    ratio = _along(flow, ncjax.squared_norm)[:, -1] / TIMES[-1] / (2 * OPTIMUM)
    return below(
        NCJAX, "|Z|²/log t → 2(K-1)√n", _flow_setting(flow), np.abs(ratio - 1).max(), 0.005
    )


def _sharp_loss(flow) -> Statement:
    ratio = _loss_product(flow)[:, -1] / (OPTIMUM / 2)
    return below(
        NCJAX, "t L log t → (K-1)√n/2", _flow_setting(flow), np.abs(ratio - 1).max(), 0.005
    )


def _exponents(flow) -> Statement:
    metrics = _along(flow, ncjax.collapse_metrics)
    columns = {
        "mean_norm_variation": 1.0,
        "mean_cosine_deviation": 1.0,
        "centred_classifier_cosine_deviation": 1.0,
        "centred_self_duality": 1.0,
        "within_class_quotient": 1.0,
        "within_class_variation": 3.0,
        "self_duality": 0.5,
    }
    errors = [
        np.median(_fits.exponents(TIMES, getattr(metrics, name), (1e3, 1e4))) - exponent
        for name, exponent in columns.items()
    ]
    angle = _fits.exponents(TIMES, _along(flow, ncjax.kkt_angle), (1e3, 1e4))
    errors.append(np.median(angle) - 0.5)
    return below(
        NCJAX,
        "decay exponents 1, 3 and 1/2 of the metrics",
        _flow_setting(flow),
        np.abs(errors).max(),
        0.03,
    )


def _certificate_saddles(_flow) -> Statement:
    worst = max(
        abs(float(ncjax.certificate(block.params(SCALE)).sigma_max) - block.sigma_max)
        for block in (*SADDLES, COLLAPSE)
    )
    return below(
        NCJAX,
        "sigma_max = K/(K-b) at saddles, 1 at collapse",
        _saddle_setting(),
        worst,
        1e-10,
    )


def _certificate_flow(flow) -> Statement:
    verdicts = _along(flow, lambda p: ncjax.certificate(p).verdict)[:, -1]
    uncertified = np.sum(verdicts != ncjax.separation.GLOBAL_OPTIMUM)
    return below(NCJAX, "flows not certified optimal", _flow_setting(flow), uncertified, 0)


def _eigenvalue_closed_form(_flow) -> Statement:
    errors = []
    for block in SADDLES:
        values = _least_eigenvalues(block, block.multiplicity + 1)
        errors.append(np.abs(values[:-1] - block.eigenvalue(SCALE)).max())
        # If the next eigenvalue equals the closed form too, the multiplicity is wrong.
        errors.append(1.0 if abs(values[-1] - block.eigenvalue(SCALE)) < 1e-9 else 0.0)
    return below(
        NCJAX,
        "least eigenvalue (1 - sigma_max)/Σλ, with its multiplicity",
        _saddle_setting(),
        max(errors),
        1e-10,
    )


def _eigenvalue_example(_flow) -> Statement:
    block = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    W = jnp.kron(jnp.eye(2), block)
    params = ncjax.Params(W, W[:, None])
    eig = ncjax.hessian_eig(ncjax.log_cross_entropy, params, k=2, sphere=True)
    error = np.abs(np.asarray(eig.eigenvalues) + 0.178810508).max()
    return below(NCJAX, "-0.178810508 twice at finite norm", "Example 3.1", error, 1e-9)


def _origin(_flow) -> Statement:
    zero = ncjax.Params(jnp.zeros((K, D)), jnp.zeros((K, N, D)))
    values = ncjax.hessian_eig(ncjax.cross_entropy, zero, which="all").eigenvalues
    copies = D * (K - 1)
    expected = np.zeros(values.shape[0])
    expected[:copies], expected[-copies:] = -(N**0.5), N**0.5
    error = np.abs(np.asarray(values) - expected).max()
    return below(
        NCJAX, "Hessian ±√n, d(K-1) times each, else 0", "the origin", error, 1e-10
    )


def _plain_hessian(_flow) -> Statement:
    least = ncjax.hessian_eig(_saddles.relative_loss, COLLAPSE.params(SCALE)).eigenvalues[0]
    return below(
        NCJAX,
        "the plain Hessian of L is negative at collapse too",
        _saddle_setting([COLLAPSE]),
        least,
        -0.01,
    )


def _escape(_flow) -> Statement:
    log_times = np.geomspace(1e3, 1e4, 12)
    errors = []
    for block in SADDLES[:2]:
        flows = _saddles.escape(
            block, log_times, distance=1e-6, seeds=2, key=jax.random.key(0)
        )
        fitted = -_fits.exponents(log_times, flows.unstable, (1e3, 1e4))
        errors.append(np.abs(fitted - block.escape_exponent).max())
    return below(
        NCJAX,
        "escape like (log t)^((sigma_max - 1)/2)",
        _saddle_setting(SADDLES[:2]),
        max(errors),
        0.02,
    )


def _least_eigenvalues(block: _saddles.Block, k: int) -> np.ndarray:
    """Return the k least eigenvalues of the Riemannian Hessian of log L at a far point."""
    eig = ncjax.hessian_eig(ncjax.log_cross_entropy, block.params(SCALE), k=k, sphere=True)
    return np.asarray(eig.eigenvalues)


def _saddle_setting(blocks=SADDLES) -> str:
    return "m,b,n,d = " + " ".join(",".join(map(str, block)) for block in blocks)


CHECKS: tuple[Callable[[ncjax.FlowSolution], Statement], ...] = (
    _definition_2_1,
    _theorem_3_1_bound,
    _theorem_3_1_equality,
    _separation_value,
    _separation_minimiser,
    _theorem_3_2_loss,
    _theorem_3_2_kkt,
    _theorem_3_2_alignment,
    _corollary_norm,
    _corollary_loss,
    _example_3_1,
    _definition_3_1,
    _theorem_3_3_saddles,
    _theorem_3_3_minimiser,
    _clock,
    _invariants,
    _sharp_norm,
    _sharp_loss,
    _exponents,
    _certificate_saddles,
    _certificate_flow,
    _eigenvalue_closed_form,
    _eigenvalue_example,
    _origin,
    _plain_hessian,
    _escape,
    *_neighbours_checks.CHECKS,
    *_deep_checks.CHECKS,
)


def _findings(summary: Mapping[str, Any]) -> page.Findings:
    """Report a row for each statement."""
    statements = summary["statements"]
    num_held = sum(entry["passed"] is True for entry in statements)
    table = page.Table(
        "Every statement, what it was checked on, the number found and its bound. Source "
        "ncjax: a result of this software, not of the paper",
        ["source", "statement", "checked on", "found", "at most", "verdict"],
        [
            [
                *(entry["source"], entry["statement"], entry["on"]),
                *(page.number(entry["number"]), page.number(entry["bound"])),
                "holds" if entry["passed"] is True else "FAILS",
            ]
            for entry in statements
        ],
    )
    state = page.GOOD if num_held == len(statements) else page.BAD
    return page.Findings(state, f"{num_held} of {len(statements)} statements hold", [table])


PAGE = page.Page(title="Every statement of the theory", figures={}, show=_findings)


if __name__ == "__main__":
    cli.main(Config, run, f"experiments.{NAME}")
