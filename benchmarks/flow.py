"""Time the gradient flow: to late times, of many seeds, of wide models, against peers.

K = 10, n = 5, d = 20 in float64 unless a row names other sizes; starts are drawn from
N(0, 0.1²). Errors are the errors of |Z|² and of log L at the end, against the implicit
solver at tolerance 1e-11.

**Peers** solve the raw equation dZ/dt = -∇L to t = 1e5 at tolerance 1e-8: SciPy's DOP853
and LSODA with a NumPy gradient, torchdiffeq's dopri5, diffrax's Tsit5 with autodiff.
Gradient descent takes a million steps of size 0.1, in one compiled loop
(`ncjax.gradient_descent`) and in PyTorch. PyTorch is timed over `TORCH_STEPS` steps, and
the time of a million follows from that rate.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp  # type: ignore[import-untyped]

import ncjax
from benchmarks._timing import Program, interleave, missing, rows, warm_up
from ncjax.flow.solve import SUCCESS

SHAPE = (10, 5, 20)
TOLERANCE = 1e-8
STEP_SIZE = 0.1
LOG_T = math.log(1e5)
# Timed steps of gradient descent in PyTorch.
TORCH_STEPS = 5000
TORCHDIFFEQ = "torchdiffeq dopri5"


def measure(repeats: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows and notes of late times and of many seeds."""
    return [*far(repeats), *seeds(repeats)], []


def measure_wide(repeats: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows and notes of wide models; a call over 30 seconds is not repeated."""
    return wide(repeats), []


def draw(shape: tuple[int, int, int] = SHAPE):
    """Draw a start."""
    return ncjax.init_params(jax.random.key(0), *shape, dtype=jnp.float64)


# Late times.


def far(
    repeats: int, log_ts=(1e4, 1e5, 1e6, 1e9), explicit_to: float = 1e5
) -> list[dict[str, Any]]:
    """Return rows of the three solvers from one start, saved at 50 times."""
    start, measured = draw(), []
    for log_t in log_ts:
        times = np.geomspace(1, log_t, 50)
        names = ["implicit"]
        if log_t <= explicit_to:
            names += ["stabilised", "explicit"]
        programs = [flow_program(start, times, name) for name in names]
        warm_up(programs)
        interleave(programs, repeats)
        measured += rows(f"one start to log t = {log_t:g}", programs)
    return measured


def flow_program(start, times, solver) -> Program:
    """Return `ncjax.gradient_flow` as a program with its steps and errors in the note."""
    name = f"ncjax, {solver}"

    def call(_repeat: int):
        flow = ncjax.gradient_flow(start, times, solver=solver)
        return jax.block_until_ready(flow)

    def warm():
        flow = call(0)
        assert int(flow.result) == SUCCESS
        errors = end_errors(start, times[-1], flow.final)
        program.note = f"{int(flow.num_steps)} steps, {errors}"

    program = Program(name, call, warm)
    return program


def end_errors(start, log_t: float, final) -> str:
    """Return the errors of `final` at `log_t` as text."""
    best = ncjax.gradient_flow(start, [log_t], rtol=1e-11, solver="implicit").final
    norms = [float(ncjax.squared_norm(p)) for p in (final, best)]
    losses = [float(ncjax.log_cross_entropy(p)) for p in (final, best)]
    return (
        f"errors {abs(norms[0] / norms[1] - 1):.0e} of norm², "
        f"{abs(losses[0] - losses[1]):.0e} of log L"
    )


# Seeds.


def seeds(repeats: int, count: int = 32, log_ts=(1e3, 1e4)) -> list[dict[str, Any]]:
    """Return rows of many starts, on all devices and on one, and of a vmapped Dopri8."""
    keys = jax.random.split(jax.random.key(0), count)
    starts = jax.vmap(lambda key: ncjax.init_params(key, *SHAPE, dtype=jnp.float64))(keys)
    measured = []
    for log_t in log_ts:
        times = np.geomspace(1, log_t, 50)

        def one(start, times=times):
            return ncjax.gradient_flow(start, times).final

        programs = [
            seeds_program("ncjax, auto", one, starts, sharded=True),
            seeds_program("ncjax, auto, one device", one, starts),
            seeds_program("Dopri8 on the clock, autodiff", plain(log_t), starts),
        ]
        warm_up(programs)
        interleave(programs, repeats)
        measured += rows(f"{count} starts to log t = {log_t:g}", programs)
    return measured


def seeds_program(name: str, one: Callable, starts, sharded: bool = False) -> Program:
    """Return a program that maps `one` over all starts by vmap."""
    every = jax.vmap(one)
    if sharded:
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("seeds",))
        spec = jax.sharding.PartitionSpec("seeds")
        every = jax.shard_map(
            every, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
    compiled: list[Callable] = []

    def warm():
        compiled.append(jax.jit(every).lower(starts).compile())

    def call(_repeat: int):
        return jax.block_until_ready(compiled[-1](starts))

    return Program(name, call, warm)


def plain(log_t: float) -> Callable:
    """Return the plainest solve: the equation on the clock, autodiff, Dopri8."""

    def field(x, params, _args):
        u = jnp.expm1(x)
        log_loss, slope = jax.value_and_grad(ncjax.log_cross_entropy)(params)
        speed = (1 + u) * jnp.exp(u + log_loss)
        return jax.tree.map(lambda leaf: -speed * leaf, slope)

    return partial(
        solve_with_diffrax, field, diffrax.Dopri8(), math.log1p(math.log1p(1) + log_t)
    )


def solve_with_diffrax(field, solver, end, start, begin=0.0):
    """Solve from `start` at `begin` to `end` by diffrax; return the state at `end`."""
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        solver,
        t0=begin,
        t1=end,
        dt0=0.01 * (1 + begin),
        y0=start,
        stepsize_controller=diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE),
        max_steps=1_000_000,
    )
    return jax.tree.map(lambda leaf: leaf[-1], solution.ys)


# Wide models.


def wide(
    repeats: int, shapes=((100, 10, 128), (1000, 1, 1024)), log_t: float = 100.0
) -> list[dict[str, Any]]:
    """Return rows of wide models; a matrix product, timed in turns, gives the peak rate."""
    measured = []
    for shape in shapes:
        start = draw(shape)

        def call(_repeat: int, start=start):
            return jax.block_until_ready(ncjax.gradient_flow(start, [log_t]))

        program = Program("ncjax, explicit", call)
        steps = int(call(0).num_steps)  # also compiles
        # Three products per evaluation, six evaluations per step and one at the start.
        operations = 6 * math.prod(shape) * shape[0] * (6 * steps + 1)
        shares: list[float] = []
        for repeat in range(repeats):
            program.time(repeat)
            shares.append(operations / program.seconds[-1] / product_rate(shape))
            if program.seconds[0] > 30:
                break
        share = np.median(shares)
        program.note = f"{steps} steps, {share:.0%} of the matrix-product rate"
        problem = f"K={shape[0]} n={shape[1]} d={shape[2]} to log t = {log_t:g}"
        measured += rows(problem, [program])
    return measured


def product_rate(shape: tuple[int, int, int], seconds: float = 1.0) -> float:
    """Return operations per second of a float64 product of features and classifier."""
    num_classes, per_class, dim = shape
    left = jnp.ones((num_classes * per_class, dim))
    right = jnp.ones((dim, num_classes))
    product = jax.jit(jnp.matmul)
    product(left, right).block_until_ready()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        product(left, right).block_until_ready()
        count += 1
    return 2 * left.size * num_classes * count / (time.perf_counter() - started)


# Peers.


def peers(repeats: int, log_t: float = LOG_T) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows and notes of one start to t = 1e5."""
    start, end = draw(), math.exp(log_t)
    programs = [
        flow_program(start, np.array([log_t]), "explicit"),
        flow_program(start, np.array([log_t]), "implicit"),
        scan_program(start, round(end / STEP_SIZE)),
        *(solver_program(name, solve, start, end) for name, solve in SOLVERS.items()),
    ]
    notes = []
    for package, make in (
        ("torchdiffeq", partial(solver_program, TORCHDIFFEQ, torchdiffeq)),
        ("torch", _torch_descent),
    ):
        reason = missing(package)
        if reason:
            notes.append(reason)
        else:
            programs.append(make(start, end))
    warm_up(programs)
    interleave(programs, repeats)
    return rows(f"one start to t = {end:.0e}", programs), notes


def scan_program(start, steps: int) -> Program:
    """Return gradient descent in one compiled loop as a program."""

    def call(_repeat: int):
        descent = ncjax.gradient_descent(start, STEP_SIZE, steps, save_steps=[steps])
        return jax.block_until_ready(descent.final)

    def warm():
        errors = end_errors(start, math.log(steps * STEP_SIZE), call(0))
        program.note = f"{steps} steps, {errors}"

    program = Program("gradient descent, compiled loop", call, warm)
    return program


def solver_program(name: str, solve: Callable, start, end: float) -> Program:
    """Return a solver of the raw equation as a program."""

    def call(_repeat: int):
        return solve(start, end)

    def warm():
        program.note = end_errors(start, math.log(end), call(0))

    program = Program(name, call, warm)
    return program


def numpy_gradient(W: np.ndarray, H: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ∇L by W and by H."""
    num_classes = W.shape[0]
    logits = H @ W.T
    own = np.arange(num_classes)
    logits = logits - logits[own, :, own][:, :, None]
    weights = np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
    weights[own, :, own] = 0
    weights[own, :, own] = -weights.sum(axis=-1)
    return np.einsum("kij,kid->jd", weights, H), weights @ W


def _scipy(method: str, start, end: float, begin: float = 0.0):
    W, H = map(np.asarray, start)

    def field(_t, flat):
        slopes = numpy_gradient(
            flat[: W.size].reshape(W.shape), flat[W.size :].reshape(H.shape)
        )
        return -np.concatenate([slope.ravel() for slope in slopes])

    flat = np.concatenate([W.ravel(), H.ravel()])
    options = {"method": method, "rtol": TOLERANCE, "atol": TOLERANCE}
    solution = solve_ivp(field, (begin, end), flat, t_eval=[end], **options)
    if not solution.success:
        raise RuntimeError(solution.message)
    last = solution.y[:, -1]
    return ncjax.Params(
        jnp.asarray(last[: W.size].reshape(W.shape)),
        jnp.asarray(last[W.size :].reshape(H.shape)),
    )


@jax.jit
def _diffrax_raw(start, end: float, begin: float = 0.0):
    def field(_t, params, _args):
        return jax.tree.map(jnp.negative, jax.grad(ncjax.cross_entropy)(params))

    return solve_with_diffrax(field, diffrax.Tsit5(), end, start, begin)


# Solvers of the raw equation: start, time at the end, time at the start -> state.
SOLVERS: dict[str, Callable] = {
    "diffrax Tsit5, raw equation": lambda *args: jax.block_until_ready(_diffrax_raw(*args)),
    "SciPy DOP853": partial(_scipy, "DOP853"),
    "SciPy LSODA": partial(_scipy, "LSODA"),
}


def _torch_parts(start):
    import torch

    W, H = (torch.tensor(np.asarray(leaf)) for leaf in start)
    labels = torch.arange(W.shape[0]).repeat_interleave(H.shape[1])

    def loss(W, H):
        logits = H.reshape(-1, H.shape[-1]) @ W.T
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    return torch, W, H, loss


def torchdiffeq(start, end: float, begin: float = 0.0):
    """Solve the raw equation by torchdiffeq's dopri5; same signature as `SOLVERS`."""
    from torchdiffeq import odeint

    torch, W, H, loss = _torch_parts(start)
    times = torch.tensor([begin, end], dtype=torch.float64)

    def field(_t, state):
        with torch.enable_grad():
            leaves = [leaf.detach().requires_grad_(True) for leaf in state]
            return tuple(-g for g in torch.autograd.grad(loss(*leaves), leaves))

    last = odeint(field, (W, H), times, method="dopri5", rtol=TOLERANCE, atol=TOLERANCE)
    return ncjax.Params(*(jnp.asarray(leaf[-1].numpy()) for leaf in last))


def torch_descent(start, steps: int):
    """Take `steps` steps of gradient descent in PyTorch."""
    torch, W, H, loss = _torch_parts(start)
    leaves = [leaf.requires_grad_(True) for leaf in (W, H)]
    optimiser = torch.optim.SGD(leaves, lr=STEP_SIZE)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(*leaves).backward()
        optimiser.step()
    return ncjax.Params(*(jnp.asarray(leaf.detach().numpy()) for leaf in leaves))


def _torch_descent(start, end: float) -> Program:
    steps = round(end / STEP_SIZE)
    timed = min(steps, TORCH_STEPS)
    note = f"{steps} steps, from the rate of {timed}"
    return Program(
        "gradient descent, PyTorch",
        lambda _: torch_descent(start, timed),
        None,
        note,
        steps=timed / steps,
    )
