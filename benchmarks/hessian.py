"""Time `ncjax.hessian_eig` against PyHessian and SciPy's ARPACK, in one run.

    pip install -e .[bench] && python -m benchmarks.hessian

About five minutes on two cores. The extra `bench` holds torch, whose default wheel for
Linux brings gigabytes of CUDA; the CPU wheel does here, and is a tenth of the size:

    pip install torch --index-url https://download.pytorch.org/whl/cpu
    pip install --no-deps pyhessian

A peer that is not installed is left out, and a line says so. Prints a Markdown table and
writes `benchmarks/hessian.json`: every timing, eigenvalues, versions, device, command.

**What is asked.** ncjax: five eigenpairs from each end (`which="both", k=5`). SciPy:
`eigsh` on a `LinearOperator` over a jitted Hessian-vector product, the same ten as "BE",
or five "LA" and five "SA", to be added up for both ends. PyHessian: the top five
by magnitude, called as in its documentation; power iteration has no way to ask for the
algebraically smallest, so one row shifts the loss by -λ_max |θ|²/2 to make them the
largest in size. Same loss, parameters and dtype for all; each repeat draws new starts.

**What is measured.** Seconds of a warm call; compilation apart; the programs take turns
within each repeat. The worst |H v - λ v| / |H| of the pairs as returned, by one float64
function for all, and the worst |λ - λ*| / |H|, where λ* is the best that any program
found: by Courant and Fischer no orthonormal set overshoots either end, so what falls
short is an error or a copy missed. PyHessian has a row with its defaults and one for
which iterations are quadrupled until its residual is that of the tolerance given to the
others, or the time passes `--cap`: then it says "not reached", timed once.

**Same number, other meaning.** `tol` bounds ncjax's residuals relative to |H|, ARPACK's
estimates relative to each |λ|, which asks more of the small ones; neither needs the
product of the other, and the residuals in the table tell how far each went.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
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
from experiments import _cli, _runs

NAME = "hessian"
# Eigenpairs from each end.
K = 5
_ARPACK_RESTARTS = 2000


@dataclasses.dataclass(frozen=True)
class Config:
    """Time hessian_eig against PyHessian and SciPy's eigsh.

    Example: python -m benchmarks.hessian --repeats=5
    """

    repeats: int = _cli.flag(5, "timed calls of each program, new starts each")
    problems: str = _cli.flag(
        "mlp-22k,layer-peeled-10k,mlp-288k", "which to time, with commas between"
    )
    cap: float = _cli.flag(20.0, "seconds that PyHessian may take to reach the residual")
    torch: bool = _cli.flag(True, "time PyHessian too")
    torch_threads: int = _cli.flag(0, "threads of PyTorch; 0 for its own choice")
    out: str = _cli.flag("benchmarks/hessian.json", "where the numbers go")


class Problem(NamedTuple):
    """A loss, float64 parameters, one batch, and the same for PyTorch."""

    fn: Callable
    params: Any
    batch: Any  # arrays, or None
    torch_parts: Callable  # params, batch -> model, criterion, data


class Found(NamedTuple):
    """What a program returns."""

    values: np.ndarray  # (k,)
    vectors: np.ndarray  # (k, D)
    num_hvps: int


@dataclasses.dataclass
class Program:
    """One row of the table."""

    name: str
    pairs: str  # "both ends", "top", "bottom" or "magnitude"
    call: Callable[[int], Found]  # seed -> pairs
    warm: Callable[[], Any] | None = None  # compiles
    note: str = ""
    compile_seconds: float | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    found: list[Found] = dataclasses.field(default_factory=list)

    def time(self, seed: int) -> None:
        """Call once and keep the result."""
        begun = time.perf_counter()
        found = self.call(seed)
        self.seconds.append(time.perf_counter() - begun)
        self.found.append(found)


# Problems.


def _mlp_logits(params, x):
    for weight, bias in params[:-1]:
        x = jnp.tanh(x @ weight + bias[None])
    weight, bias = params[-1]
    return x @ weight + bias[None]


def mlp_loss(params, batch):
    """Mean cross entropy of a tanh network."""
    x, labels = batch
    log_probabilities = jax.nn.log_softmax(_mlp_logits(params, x))
    return -jnp.mean(jnp.take_along_axis(log_probabilities, labels[:, None], axis=1))


def mlp(sizes: Sequence[int], samples: int, steps: int = 200) -> Problem:
    """A network on overlapping Gaussian classes, after `steps` of gradient descent."""
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
    """The log loss of the layer-peeled model at a point of its gradient flow."""
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
    """Floating leaves in `dtype`."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def hessian_product(fn: Callable, params, batch) -> Callable[[Any], jax.Array]:
    """`v -> H v` for flat v, jitted: forward over reverse."""
    unravel = ravel_pytree(params)[1]
    data = () if batch is None else (batch,)

    @jax.jit
    def product(params, data, v):
        def gradient(params):
            return jax.grad(fn)(params, *data)

        return ravel_pytree(jax.jvp(gradient, (params,), (unravel(v),))[1])[0]

    return lambda v: product(params, data, v)


def ncjax_program(problem: Problem, dtype: str) -> Program:
    """`hessian_eig`, as its docstring says."""
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

    return Program("ncjax hessian_eig", "both ends", call, warm)


def scipy_programs(problem: Problem, dtype: str) -> list[Program]:
    """`eigsh` over a jitted product, at the tolerance of `hessian_eig`."""
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
            f"eigsh {which}", pairs, lambda seed: solve(seed, which, k), warm=warm
        )

    def warm() -> None:
        product(np.zeros(dim, dtype)).block_until_ready()

    return [
        program("LA", K, "top"),
        program("SA", K, "bottom"),
        program("BE", 2 * K, "both ends"),
    ]


def pyhessian_call(problem: Problem, shift: float = 0.0, **options) -> Callable:
    """PyHessian's power iteration on one batch, as its users call it."""
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

    # `pyhessian.hessian` is the class; the module of that name is under sys.modules.
    module = sys.modules["pyhessian.hessian"]
    product = module.hessian_vector_product

    def call(seed: int) -> Found:
        torch.manual_seed(seed)
        model.zero_grad()
        counted = mock.patch.object(module, "hessian_vector_product", wraps=product)
        with warnings.catch_warnings(), counted as products:
            # backward(create_graph=True) warns of the reference cycle that it makes.
            warnings.simplefilter("ignore")
            computer = pyhessian.hessian(model, criterion, data=data, cuda=False)
            values, vectors = computer.eigenvalues(top_n=K, **options)
        rows = [torch.cat([part.ravel() for part in vector]) for vector in vectors]
        vectors = torch.stack(rows).detach().numpy()
        return Found(np.array(values) + shift, vectors, products.call_count)

    return call


def tolerance(dtype: str) -> float:
    """Default tolerance of `hessian_eig`."""
    return float(np.finfo(dtype).eps) ** (2 / 3)


# Measurement.


def residuals(product: Callable, found: Found) -> np.ndarray:
    """|H v - λ v| of unit v, in float64 whatever the program's dtype."""
    norms = []
    for value, vector in zip(found.values, found.vectors.astype(float), strict=True):
        unit = vector / np.linalg.norm(vector)
        norms.append(np.linalg.norm(np.asarray(product(unit)) - float(value) * unit))
    return np.array(norms)


def _warm_up(programs: Sequence[Program]) -> None:
    """Compile, and time that."""
    for program in programs:
        if program.warm is not None:
            begun = time.perf_counter()
            program.warm()
            program.compile_seconds = time.perf_counter() - begun


def _interleave(programs: Sequence[Program], repeats: int) -> None:
    for seed in range(repeats):
        for program in programs:
            program.time(seed)


def _raised(problem: Problem, product: Callable, norm: float, cap: float) -> Program:
    """PyHessian with iterations quadrupled until its residual is within tolerance."""
    iterations = 100
    while True:
        program = Program(
            f"PyHessian, tol=0, maxIter={iterations}",
            "magnitude",
            pyhessian_call(problem, maxIter=iterations, tol=0.0),
        )
        program.time(0)
        worst = float(residuals(product, program.found[0]).max()) / norm
        if worst <= tolerance("float32"):
            program.seconds, program.found = [], []
            return program
        if 4 * program.seconds[0] > cap:
            program.note = "residual not reached"
            return program
        iterations *= 4


def _pyhessian_programs(
    problem: Problem, product: Callable, known: Found, cap: float
) -> list[Program]:
    norm = float(np.abs(known.values).max())
    return [
        Program("PyHessian, defaults", "magnitude", pyhessian_call(problem)),
        _raised(problem, product, norm, cap),
        Program(
            "PyHessian, shifted, defaults",
            "bottom",
            pyhessian_call(problem, shift=float(known.values.max())),
        ),
    ]


def measure(problem: Problem, dtype: str, config: Config, peers: bool) -> dict[str, Any]:
    """All programs on one problem in one dtype."""
    params, batch = _cast(_cast((problem.params, problem.batch), dtype), "float64")
    product = hessian_product(problem.fn, params, batch)
    programs = [ncjax_program(problem, dtype), *scipy_programs(problem, dtype)]
    _warm_up(programs)
    once: list[Program] = []
    if peers:
        others = _pyhessian_programs(problem, product, programs[0].call(0), config.cap)
        once = [program for program in others if program.note]
        programs += [program for program in others if not program.note]
    _interleave(programs, config.repeats)
    programs += once
    dim = sum(leaf.size for leaf in jax.tree.leaves(params))
    best = _best(programs)
    norm = float(np.abs(best["both ends"]).max())
    return {
        "dtype": dtype,
        "dim": dim,
        "norm": norm,
        "tol": tolerance(dtype),
        "best_eigenvalues": best["both ends"].tolist(),
        "seconds_per_hvp": _product_seconds(problem, dtype),
        "rows": [_row(program, programs[0], product, best, norm) for program in programs],
    }


def _best(programs: Sequence[Program]) -> dict[str, np.ndarray]:
    """The outermost eigenvalues that any program with true ends found."""
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


def _row(program, first, product, best, norm) -> dict[str, Any]:
    seconds = float(np.median(program.seconds))
    worst = [float(residuals(product, f).max(initial=0.0)) for f in program.found]
    expected = best[program.pairs]
    complete = all(len(f.values) == len(expected) for f in program.found)
    errors = [
        float(np.abs(np.sort(f.values) - expected).max()) / norm
        for f in program.found
        if complete
    ]
    return {
        "program": program.name,
        "pairs": program.pairs,
        "note": program.note if complete else "not converged",
        "median_seconds": seconds,
        "over_ncjax": seconds / float(np.median(first.seconds)),
        "seconds": program.seconds,
        "compile_seconds": program.compile_seconds,
        "num_hvps": float(np.median([f.num_hvps for f in program.found])),
        "worst_relative_residual": max(worst) / norm,
        "worst_relative_error": max(errors, default=None),
        "eigenvalues": np.sort(program.found[0].values).tolist(),
    }


def _product_seconds(problem: Problem, dtype: str, calls: int = 20) -> float:
    """Median time of one jitted Hessian-vector product, called from Python."""
    params, batch = _cast((problem.params, problem.batch), dtype)
    product = hessian_product(problem.fn, params, batch)
    vector = ravel_pytree(params)[0]
    times = []
    for _ in range(calls + 1):
        begun = time.perf_counter()
        product(vector).block_until_ready()
        times.append(time.perf_counter() - begun)
    return float(np.median(times[1:]))


# The run.


def run(config: Config) -> dict[str, Any]:
    """Time everything, print the table, write the JSON file.

    Raises:
      ValueError: a setting is out of range.
    """
    names = config.problems.split(",")
    unknown = [name for name in names if name not in PROBLEMS]
    if unknown:
        raise ValueError(f"--problems must be among {sorted(PROBLEMS)}, got {unknown}")
    if config.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {config.repeats}")
    skipped = _missing_peer() if config.torch else "PyHessian skipped: --notorch"
    if config.torch_threads and not skipped:
        import torch

        torch.set_num_threads(config.torch_threads)
    begun = time.perf_counter()
    summary: dict[str, Any] = {"skipped": skipped, "results": []} | _provenance()
    for name in names:
        problem = PROBLEMS[name]()
        for dtype in ("float32", "float64"):
            peers = dtype == "float32" and not skipped
            result = {"problem": name} | measure(problem, dtype, config, peers)
            summary["results"].append(result)
            # After each, so that an interrupted run leaves what it has.
            _runs.write_json(Path(config.out), summary)
            print(f"{name}, {dtype}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    print(table(summary))
    return summary


def _missing_peer() -> str:
    """Why PyHessian is left out; empty if it is not."""
    for name in ("torch", "pyhessian"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"PyHessian skipped: {error}; pip install torch pyhessian"
    return ""


def _provenance() -> dict[str, Any]:
    known = _runs.provenance()
    for package in ("scipy", "torch", "pyhessian"):
        try:
            known["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            known["versions"][package] = "not installed"
    return known | {"processor": _processor()}


def _processor() -> str:
    """Model of the processor, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return models[0] if models else platform.processor()


def table(summary: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = []
    for result in summary["results"]:
        lines += [
            "",
            f"**{result['problem']}**, {result['dtype']}: D = {result['dim']}, "
            f"|H| = {result['norm']:.4g}, tol = {result['tol']:.1e}, "
            f"{1e3 * result['seconds_per_hvp']:.2f} ms for one product",
            "",
            "| program | pairs | seconds | over ncjax | products | residual / |H|"
            " | error / |H| | compile s |".replace("|H|", "&#124;H&#124;"),
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in result["rows"]:
            note = f" ({row['note']})" if row["note"] else ""
            cells = [
                row["program"] + note,
                row["pairs"],
                f"{row['median_seconds']:.3f}",
                f"{row['over_ncjax']:.2f}",
                f"{row['num_hvps']:.0f}",
                f"{row['worst_relative_residual']:.1e}",
                _or_dash(row["worst_relative_error"], ".1e"),
                _or_dash(row["compile_seconds"], ".1f"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    if summary["skipped"]:
        lines += ["", summary["skipped"]]
    versions = json.dumps(summary["versions"]).strip("{}").replace('"', "")
    lines += ["", f"{summary['processor']}, {summary['platform']}; {versions}"]
    return "\n".join(lines)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    _cli.main(Config, run, f"benchmarks.{NAME}")
