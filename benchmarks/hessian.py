"""Time `ncjax.hessian_eig` against PyHessian and SciPy's ARPACK.

**Request.** ncjax computes five eigenpairs from each end (`which="both", k=5`). SciPy runs
`eigsh` on a `LinearOperator` over a jitted Hessian-vector product: the same ten as "BE", or
five "LA" and five "SA", whose times add up to both ends. PyHessian computes the top five by
magnitude, called as in its documentation. Power iteration cannot return the algebraically
smallest, so one row shifts the loss by -λ_max |θ|²/2 to make them the largest in magnitude.
Loss, parameters and dtype are the same for all; each repeat draws new starts.

**Measurement.** Seconds are of a warm call; compilation is timed apart; the programs take
turns within each repeat. One float64 function computes the worst |H v - λ v| / |H| of
the returned pairs for all programs. The worst |λ - λ*| / |H| compares with λ*, the best
value that any program found: by Courant and Fischer no orthonormal set overshoots either
end, so a value that falls short is an error or a missed copy. PyHessian has one row with
its defaults. For another row its iterations are quadrupled until its residual meets the
tolerance of the other programs, or the time passes `CAP`: then the row says "not reached"
and is timed once.

**Tolerances.** `tol` bounds ncjax's residuals relative to |H|, and ARPACK's estimates
relative to each |λ|, which is stricter for small λ. The residuals in the table show the
accuracy that each program reached.
"""

import dataclasses
import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import (  # type: ignore[import-untyped]
    ArpackNoConvergence,
    LinearOperator,
    eigsh,
)

import ncjax
from benchmarks import _timing

# Eigenpairs from each end.
K = 5
_ARPACK_RESTARTS = 2000
# Largest number of seconds for PyHessian to reach the residual.
CAP = 12.0


class Problem(NamedTuple):
    """A loss, float64 parameters and one batch, with the PyTorch version of them."""

    fn: Callable
    params: Any
    batch: Any  # arrays, or None
    torch_parts: Callable  # params, batch -> model, criterion, data


class Found(NamedTuple):
    """Eigenpairs that a program returns."""

    values: np.ndarray  # (k,)
    vectors: np.ndarray  # (k, D)
    num_hvps: int


@dataclasses.dataclass
class Program(_timing.Program):
    """One row of the table, with the eigenpairs that it requests and finds."""

    pairs: str = "both ends"  # or "top", "bottom", "magnitude"
    found: list[Found] = dataclasses.field(default_factory=list)

    def keep(self, result: Found) -> None:
        """Store the eigenpairs for the residuals."""
        self.found.append(result)


# Problems.


def _mlp_logits(params, x):
    for weight, bias in params[:-1]:
        x = jnp.tanh(x @ weight + bias[None])
    weight, bias = params[-1]
    return x @ weight + bias[None]


def mlp_loss(params, batch):
    """Return the mean cross entropy of a tanh network."""
    x, labels = batch
    log_probabilities = jax.nn.log_softmax(_mlp_logits(params, x))
    return -jnp.mean(jnp.take_along_axis(log_probabilities, labels[:, None], axis=1))


def mlp(sizes: Sequence[int], samples: int, steps: int = 200) -> Problem:
    """Train a network on overlapping Gaussian classes by `steps` of gradient descent."""
    rng = np.random.default_rng(0)
    labels = np.arange(samples) % sizes[-1]
    centres = rng.normal(size=(sizes[-1], sizes[0]))
    x = 0.25 * centres[labels] + rng.normal(size=(samples, sizes[0]))
    batch = (jnp.asarray(x), jnp.asarray(labels))
    params = [
        (jnp.asarray(rng.normal(size=(p, q)) / p**0.5), jnp.zeros(q))
        for p, q in itertools.pairwise(sizes)
    ]

    @jax.jit
    def descend(params):
        def step(_, params):
            slope = jax.grad(mlp_loss)(params, batch)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, slope)

        return jax.lax.fori_loop(0, steps, step, params)

    return Problem(mlp_loss, descend(params), batch, _torch_mlp)


def layer_peeled(num_classes: int, per_class: int, dim: int, log_t: float) -> Problem:
    """Return the log loss of the layer-peeled model at a point of its gradient flow."""
    start = ncjax.init_params(jax.random.key(0), num_classes, per_class, dim)
    flow = ncjax.gradient_flow(start, np.array([log_t]))
    params = jax.tree.map(lambda leaf: leaf[0], flow.params)
    return Problem(ncjax.log_cross_entropy, params, None, _torch_layer_peeled)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "mlp-22k": lambda: mlp((64, 128, 96, 10), 512),
    "mlp-288k": lambda: mlp((300, 512, 256, 10), 128),
    "layer-peeled-10k": lambda: layer_peeled(10, 50, 20, 10.0),
    "mlp-tiny": lambda: mlp((16, 40, 20, 4), 64, 20),
}


def _torch_mlp(params, batch):
    import torch

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            leaves = [torch.tensor(np.asarray(leaf)) for leaf in jax.tree.leaves(params)]
            self.leaves = torch.nn.ParameterList(leaves)

        def forward(self, x):
            pairs = list(zip(self.leaves[::2], self.leaves[1::2], strict=True))
            for weight, bias in pairs[:-1]:
                x = torch.tanh(torch.addmm(bias, x, weight))
            return torch.addmm(pairs[-1][1], x, pairs[-1][0])

    x, labels = (torch.tensor(np.asarray(leaf)) for leaf in batch)
    return Network(), torch.nn.CrossEntropyLoss(), (x, labels.long())


def _torch_layer_peeled(params, batch):
    import torch

    class LayerPeeled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.W = torch.nn.Parameter(torch.tensor(np.asarray(params.W)))
            self.H = torch.nn.Parameter(torch.tensor(np.asarray(params.H)))

        def forward(self, _):
            return self.H @ self.W.T

    def criterion(logits, labels):
        own = logits.gather(2, labels[..., None])
        others = (logits - own).scatter(2, labels[..., None], -math.inf)
        odds = torch.logsumexp(others, dim=-1)
        return torch.logsumexp(torch.log(torch.nn.functional.softplus(odds)).ravel(), 0)

    num_classes, per_class, _ = params.H.shape
    labels = torch.arange(num_classes)[:, None].expand(-1, per_class)
    return LayerPeeled(), criterion, (torch.zeros(1), labels)


# Programs.


def _cast(tree, dtype: str):
    """Cast floating leaves to `dtype`."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def hessian_product(fn: Callable, params, batch) -> Callable[[Any], jax.Array]:
    """Return the jitted `v -> H v` for flat v, forward over reverse."""
    unravel = ravel_pytree(params)[1]
    data = () if batch is None else (batch,)

    @jax.jit
    def product(params, data, v):
        def gradient(params):
            return jax.grad(fn)(params, *data)

        return ravel_pytree(jax.jvp(gradient, (params,), (unravel(v),))[1])[0]

    return lambda v: product(params, data, v)


def ncjax_program(problem: Problem, dtype: str) -> Program:
    """Return `hessian_eig` as a program, called as in its docstring."""
    params, batch = _cast((problem.params, problem.batch), dtype)
    batches = None if batch is None else jax.tree.map(lambda x: x[None], batch)

    def solve(seed: int, max_hvps: int = 100_000) -> ncjax.HessianEig:
        return ncjax.hessian_eig(
            problem.fn,
            params,
            batches=batches,
            k=K,
            which="both",
            method="lanczos",
            key=jax.random.key(seed),
            max_hvps=max_hvps,
        )

    def call(seed: int) -> Found:
        eig = solve(seed)
        leaves = jax.tree.leaves(eig.eigenvectors)
        vectors = np.concatenate([np.asarray(x).reshape(len(x), -1) for x in leaves], 1)
        return Found(np.asarray(eig.eigenvalues), vectors, int(eig.num_hvps))

    def warm() -> None:
        jax.block_until_ready(solve(0, max_hvps=1))

    return Program("ncjax hessian_eig", call, warm)


def scipy_programs(problem: Problem, dtype: str) -> list[Program]:
    """Return `eigsh` over a jitted product at the tolerance of `hessian_eig`."""
    params, batch = _cast((problem.params, problem.batch), dtype)
    dim = sum(leaf.size for leaf in jax.tree.leaves(params))
    product = hessian_product(problem.fn, params, batch)

    def solve(seed: int, which: str, k: int) -> Found:
        count = 0

        def matvec(v):
            nonlocal count
            count += 1
            return np.asarray(product(np.ravel(v)))

        operator = LinearOperator((dim, dim), matvec=matvec, dtype=np.dtype(dtype))
        start = np.random.default_rng(seed).normal(size=dim).astype(dtype)
        settings = {"tol": tolerance(dtype), "maxiter": _ARPACK_RESTARTS}
        try:
            values, vectors = eigsh(operator, k, which=which, v0=start, **settings)
        except ArpackNoConvergence as error:
            values, vectors = error.eigenvalues, error.eigenvectors
        return Found(values, vectors.T, count)

    def program(which: str, k: int, pairs: str) -> Program:
        return Program(
            f"eigsh {which}", lambda seed: solve(seed, which, k), warm, pairs=pairs
        )

    def warm() -> None:
        product(np.zeros(dim, dtype)).block_until_ready()

    return [
        program("LA", K, "top"),
        program("SA", K, "bottom"),
        program("BE", 2 * K, "both ends"),
    ]


def pyhessian_call(problem: Problem, shift: float = 0.0, **options) -> Callable:
    """Return PyHessian's power iteration on one batch, called as in its documentation."""
    import pyhessian
    import torch

    model, loss, data = problem.torch_parts(
        *_cast((problem.params, problem.batch), "float32")
    )

    def criterion(outputs, targets):
        value = loss(outputs, targets)
        if shift:
            value = value - shift / 2 * sum((p**2).sum() for p in model.parameters())
        return value

    # `pyhessian.hessian` is the class: the module of that name is in sys.modules.
    module = sys.modules["pyhessian.hessian"]
    product = module.hessian_vector_product

    def call(seed: int) -> Found:
        torch.manual_seed(seed)
        model.zero_grad()
        counted = mock.patch.object(module, "hessian_vector_product", wraps=product)
        with warnings.catch_warnings(), counted as products:
            # backward(create_graph=True) warns of its reference cycle.
            warnings.simplefilter("ignore")
            computer = pyhessian.hessian(model, criterion, data=data, cuda=False)
            values, vectors = computer.eigenvalues(top_n=K, **options)
        rows = [torch.cat([part.ravel() for part in vector]) for vector in vectors]
        vectors = torch.stack(rows).detach().numpy()
        return Found(np.array(values) + shift, vectors, products.call_count)

    return call


def tolerance(dtype: str) -> float:
    """Return the default tolerance of `hessian_eig`."""
    return float(np.finfo(dtype).eps) ** (2 / 3)


# Measurement.


def residuals(product: Callable, found: Found) -> np.ndarray:
    """Return |H v - λ v| of unit v in float64, whatever the dtype of the program."""
    norms = []
    for value, vector in zip(found.values, found.vectors.astype(float), strict=True):
        unit = vector / np.linalg.norm(vector)
        norms.append(np.linalg.norm(np.asarray(product(unit)) - float(value) * unit))
    return np.array(norms)


def _raised(problem: Problem, product: Callable, norm: float) -> Program:
    """Quadruple PyHessian's iterations until its residual is within the tolerance."""
    iterations = 100
    while True:
        program = Program(
            f"PyHessian, tol=0, maxIter={iterations}",
            pyhessian_call(problem, maxIter=iterations, tol=0.0),
            pairs="magnitude",
        )
        program.time(0)
        worst = float(residuals(product, program.found[0]).max()) / norm
        if worst <= tolerance("float32"):
            program.seconds, program.found = [], []
            return program
        if 4 * program.seconds[0] > CAP:
            program.note = "residual not reached"
            return program
        iterations *= 4


def _pyhessian_programs(problem: Problem, product: Callable, known: Found) -> list[Program]:
    norm = float(np.abs(known.values).max())
    return [
        Program("PyHessian, defaults", pyhessian_call(problem), pairs="magnitude"),
        _raised(problem, product, norm),
        Program(
            "PyHessian, shifted, defaults",
            pyhessian_call(problem, shift=float(known.values.max())),
            pairs="bottom",
        ),
    ]


def measure(
    repeats: int, problems: Sequence[str] = ("mlp-22k", "layer-peeled-10k", "mlp-288k")
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows and notes for names of `PROBLEMS`."""
    skipped = _timing.missing("torch", "pyhessian")
    measured = []
    for name in problems:
        problem = PROBLEMS[name]()
        for dtype in ("float32", "float64"):
            peers = dtype == "float32" and not skipped
            measured += measure_one(name, problem, dtype, repeats, peers)
    return measured, [skipped] if skipped else []


def measure_one(
    name: str, problem: Problem, dtype: str, repeats: int, peers: bool
) -> list[dict[str, Any]]:
    """Return the rows of all programs on one problem in one dtype."""
    params, batch = _cast(_cast((problem.params, problem.batch), dtype), "float64")
    product = hessian_product(problem.fn, params, batch)
    programs = [ncjax_program(problem, dtype), *scipy_programs(problem, dtype)]
    _timing.warm_up(programs)
    once: list[Program] = []
    if peers:
        others = _pyhessian_programs(problem, product, programs[0].call(0))
        once = [program for program in others if program.note]
        programs += [program for program in others if not program.note]
    _timing.interleave(programs, repeats)
    programs += once
    dim = sum(leaf.size for leaf in jax.tree.leaves(params))
    best = _best(programs)
    norm = float(np.abs(best["both ends"]).max())
    shared = {
        "dtype": dtype,
        "dim": dim,
        "norm": norm,
        "tol": tolerance(dtype),
        "seconds_per_hvp": _product_seconds(problem, dtype),
    }
    timed = _timing.rows(f"{name}, {dtype}, {dim} parameters", programs, **shared)
    return [
        row | _quality(program, product, best, norm)
        for row, program in zip(timed, programs, strict=True)
    ]


def _best(programs: Sequence[Program]) -> dict[str, np.ndarray]:
    """Return the outermost eigenvalues found by any program that computes both ends."""
    found = [
        np.sort(f.values)
        for program in programs
        for f in program.found
        if program.pairs == "both ends" and len(f.values) == 2 * K
    ]
    low, high = np.min(found, axis=0)[:K], np.max(found, axis=0)[K:]
    both = np.concatenate([low, high])
    magnitude = both[np.argsort(-np.abs(both))[:K]]
    return {"both ends": both, "top": high, "bottom": low, "magnitude": np.sort(magnitude)}


def _quality(program, product, best, norm) -> dict[str, Any]:
    """Compare the eigenpairs of a program with the best of all programs."""
    worst = [float(residuals(product, f).max(initial=0.0)) for f in program.found]
    expected = best[program.pairs]
    complete = all(len(f.values) == len(expected) for f in program.found)
    errors = [
        float(np.abs(np.sort(f.values) - expected).max()) / norm
        for f in program.found
        if complete
    ]
    return {
        "pairs": program.pairs,
        "note": _note(program, complete, max(worst) / norm),
        "num_hvps": float(np.median([f.num_hvps for f in program.found])),
        "worst_relative_residual": max(worst) / norm,
        "worst_relative_error": max(errors, default=None),
        "eigenvalues": np.sort(program.found[0].values).tolist(),
    }


def _note(program: Program, complete: bool, residual: float) -> str:
    note = f", {program.note}" if complete and program.note else ""
    return f"{program.pairs}, {residual:.0e}{note if complete else ', not converged'}"


def _product_seconds(problem: Problem, dtype: str, calls: int = 20) -> float:
    """Return the median seconds of one jitted Hessian-vector product from Python."""
    params, batch = _cast((problem.params, problem.batch), dtype)
    product = hessian_product(problem.fn, params, batch)
    vector = ravel_pytree(params)[0]
    times = []
    for _ in range(calls + 1):
        started = time.perf_counter()
        product(vector).block_until_ready()
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))
