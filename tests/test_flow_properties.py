"""The flow from random states, against SciPy and under symmetries."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.special import log_expit, logsumexp
from strategies import WIDE, random_params, seeds, sizes

import ncjax
from ncjax.flow.solve import STEP_LIMIT, SUCCESS

pytestmark = pytest.mark.usefixtures("quick_compilation")

few = settings(max_examples=settings.default.max_examples // 5)
# K, n, d: no room for a simplex ETF; a campaign adds shapes with room.
SHAPES = [(4, 2, 2), *([(2, 1, 1), (3, 2, 2), (3, 1, 4), (5, 2, 6)] if WIDE else [])]
SOLVERS = ["implicit", *(["explicit"] if WIDE else [])]
KINDS = ("plain", "unbalanced", "zero W", "zero H", "twins")
TIMES = ("wide", "clustered", "early", "about x = 1", "leg", "from zero")


def start_of(seed, shape, kind):
    """Draw a start of this kind with a scale from 1e-3 to 10."""
    rng = np.random.default_rng(seed)
    W, H = (np.asarray(x) for x in random_params(seed, *shape, 10 ** rng.uniform(-3, 1)))
    ratio = 10 ** rng.uniform(-2, 2) if kind == "unbalanced" else 1.0
    W, H = ratio * W * (kind != "zero W"), H / ratio * (kind != "zero H")
    if kind == "twins":  # each sample the row of its class
        H = np.repeat(W[:, None], shape[1], axis=1)
    return ncjax.Params(jnp.asarray(W), jnp.asarray(H))


def times_of(seed, kind):
    """Draw four times, and the time of the start."""
    rng, start = np.random.default_rng(seed + 1), -math.inf
    if kind == "wide":
        times = np.sort(10 ** rng.uniform(-1, 4, 4))
    elif kind == "clustered":
        gap = 10 ** rng.uniform(-5, -1)
        times = 10 ** rng.uniform(0, 3.5) * (1 + gap * np.arange(4))
    elif kind == "early":
        times = np.sort(rng.uniform(-20, 2, 4))
    elif kind == "about x = 1":
        times = 1.5 + np.sort(rng.uniform(-0.2, 0.2, 4))
    elif kind == "leg":
        # Much later, a start with another loss than the flow moves within a rounding of x.
        start = 10 ** rng.uniform(-1, 0.5)
        times = start + np.append(0, np.sort(10 ** rng.uniform(-3, 2, 3)))
    else:
        times = np.append(-math.inf, np.sort(10 ** rng.uniform(-1, 3, 3)))
    return times, start


def clock(log_time):
    return np.log1p(np.logaddexp(0, log_time))


def scipy_flow(params, times, start):
    """W (T, K, d) and H (T, K, n, d), by LSODA on the clock x for Y = exp(-x/2) Z."""
    (K, d), (_, n, _) = params.W.shape, params.H.shape
    own = np.eye(K, dtype=bool)[:, None]

    def field(x, y):
        Z = np.exp(x / 2) * y
        W, H = Z[: K * d].reshape(K, d), Z[K * d :].reshape(K, n, d)
        logits = H @ (W - W.mean(axis=0)).T
        excess = logits - np.sum(logits, axis=2, where=own, keepdims=True)
        excess = np.where(own, -np.inf, excess)
        odds = logsumexp(excess, axis=2, keepdims=True)
        loss = logsumexp(oracles.log_softplus(odds)[0].astype(float))
        slopes = np.exp(excess + log_expit(-odds) - loss)
        slopes -= own * slopes.sum(axis=2, keepdims=True)
        by_W, by_H = np.einsum("kij,kid->jd", slopes, H), slopes @ W
        u = np.expm1(x)
        speed = (1 + u) * np.exp(u + loss - x / 2)
        return -speed * np.concatenate([by_W.ravel(), by_H.ravel()]) - y / 2

    x = clock(times)
    y = np.concatenate([np.ravel(leaf) for leaf in params]) * np.exp(-clock(start) / 2)
    size = min(1.0, np.sqrt(np.mean(y**2)))
    span = (float(clock(start)), float(x[-1]))
    found = solve_ivp(field, span, y, "LSODA", x, rtol=1e-12, atol=1e-13 * size)
    assert found.success, found.message
    Z = np.exp(x / 2) * found.y
    return Z[: K * d].T.reshape(-1, K, d), Z[K * d :].T.reshape(-1, K, n, d)


def solved(params, log_times, solver, **more):
    """The flow; examples that need too many explicit steps are discarded."""
    limit = {} if solver == "implicit" else {"max_steps": 100_000}
    flow = ncjax.gradient_flow(
        params, log_times, solver=solver, rtol=1e-10, **limit, **more
    )
    assume(solver == "implicit" or int(flow.result) != STEP_LIMIT)
    assert int(flow.result) == SUCCESS
    return flow


def norms(W, H):
    """|Z| at each of T times."""
    parts = (np.asarray(leaf).reshape(len(leaf), -1) for leaf in (W, H))
    return np.linalg.norm(np.concatenate(list(parts), axis=1), axis=1)


@few
@given(
    seeds,
    st.sampled_from(SHAPES),
    st.sampled_from(KINDS),
    st.sampled_from(TIMES),
    st.sampled_from(SOLVERS),
)
def test_the_flow_agrees_with_scipy(seed, shape, kind, times, solver):
    params = start_of(seed, shape, kind)
    log_times, start = times_of(seed, times)
    flow = solved(params, log_times, solver, start_log_time=start)
    W, H = scipy_flow(params, log_times, start)
    gap = norms(flow.params.W - W, flow.params.H - H)
    np.testing.assert_array_less(gap, 1e-6 * norms(W, H) + 1e-300)


@few
@given(seeds, st.sampled_from(["plain", "unbalanced"]), st.sampled_from(SOLVERS))
def test_the_flow_commutes_with_rotation_and_two_legs_agree_with_one(seed, kind, solver):
    shape = SHAPES[0]
    params, (log_times, _) = start_of(seed, shape, kind), times_of(seed, "wide")
    flow = solved(params, log_times, solver)
    rng = np.random.default_rng(seed)
    frame = np.linalg.qr(rng.normal(size=(shape[2], shape[2])))[0]
    order = rng.permutation(shape[0])
    turned = jax.tree.map(lambda leaf: (leaf @ frame)[order], params)
    other = solved(turned, log_times, solver)
    gaps = jax.tree.map(lambda a, b: a - (b @ frame)[:, order], other.params, flow.params)
    size = norms(*flow.params)
    np.testing.assert_array_less(norms(*gaps), 1e-6 * size)
    # The solution reports the loss and the drift of its states.
    losses = jax.vmap(ncjax.log_cross_entropy)(flow.params)
    np.testing.assert_allclose(flow.log_loss, losses, rtol=1e-12, atol=1e-12)
    assert (np.diff(flow.log_loss) < 0).all()
    drift = jax.vmap(lambda state: ncjax.invariant_drift(state, params))(flow.params)
    # Explicit solvers do not restore it: this is their error.
    np.testing.assert_array_less(drift.balance, 1e-10 if solver == "implicit" else 1e-8)
    np.testing.assert_array_less(flow.drift.balance, 1e-6)
    middle = jax.tree.map(lambda leaf: leaf[1], flow.params)
    late = log_times[1] + (log_times[3] - log_times[1]) * np.array([0, 0.2, 0.5, 1])
    leg = solved(middle, late, solver, start_log_time=late[0])
    gaps = jax.tree.map(lambda a, b: (a - b)[None], leg.final, flow.final)
    np.testing.assert_array_less(norms(*gaps), 1e-6 * size[-1])


@few
@given(seeds, sizes, st.sampled_from([1e-3, 0.1, 0.5]), st.integers(1, 9))
def test_descent_agrees_with_a_numpy_loop(seed, shape, step_size, num_steps):
    params = random_params(seed, *shape, 1.0)
    got = ncjax.gradient_descent(params, step_size, num_steps, save_steps=[0, num_steps])
    W, H = (np.asarray(leaf) for leaf in params)
    for _ in range(num_steps):
        log_loss, by_W, by_H = oracles.log_cross_entropy_and_gradient(W, H)
        step = step_size * np.exp(log_loss)
        W, H = (W - step * by_W).astype(float), (H - step * by_H).astype(float)
    np.testing.assert_allclose(got.final.W, W, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(got.final.H, H, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(got.params.H[0], params.H)
    np.testing.assert_allclose(got.log_loss[1], ncjax.log_cross_entropy(got.final))
