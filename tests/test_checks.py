"""Numbers and parameters that callers pass: used as given, or refused with advice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ncjax
from ncjax.checks import check_count, check_positive

RNG = np.random.default_rng(0)
W, H = RNG.normal(size=(3, 4)), RNG.normal(size=(3, 2, 4))


@pytest.mark.parametrize("value", [0, -1, 0.0, np.nan, np.inf, None, "1", 1j, [1.0], "a"])
def test_positive_numbers_are_positive_and_finite(value):
    with pytest.raises(ValueError, match="rtol must be positive and finite, got"):
        check_positive("rtol", value)


@pytest.mark.parametrize("value", [1, 0.5, 1e-300, np.float32(2), jnp.float32(2)])
def test_positive_numbers_of_any_type_pass(value):
    check_positive("rtol", value)


@pytest.mark.parametrize("value", [1e-60, 1e-40, 1e60, np.float64(1e-60)])
def test_positive_numbers_that_a_cast_would_lose_are_refused(value):
    check_positive("rtol", value, jnp.float64)
    with pytest.raises(ValueError, match=r"rtol must be .* in float32, got"):
        check_positive("rtol", value, jnp.dtype(jnp.float32))


def test_counts_are_integers_that_jax_holds():
    check_count("max_steps", 2**40, least=1)
    for value, message in (
        (0, "must be an integer of at least 1"),
        (1.0, "must be an integer of at least 1"),
        (2**63, f"must be an integer of at most {2**63 - 1}, got {2**63}"),
    ):
        with pytest.raises(ValueError, match=f"max_steps {message}"):
            check_count("max_steps", value, least=1)
    with jax.enable_x64(False), pytest.raises(ValueError, match=f"at most {2**31 - 1}"):
        check_count("max_steps", 2**31, least=1)


PARAMS = ncjax.Params(W.astype(np.float32), H.astype(np.float32))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: ncjax.gradient_descent(PARAMS, 1e-60, 9), "step_size must be .* float32"),
        (lambda: ncjax.gradient_flow(PARAMS, [1.0], rtol=1e-60), "rtol must be .* float32"),
        (lambda: ncjax.gradient_flow(PARAMS, [1.0], max_steps=2**63), "max_steps must be"),
        (
            lambda: ncjax.gradient_flow(PARAMS, None),
            "either log_times or times, .* got neither",
        ),
        (lambda: ncjax.gradient_flow(PARAMS, ["1"]), "log_times must be .* got strings"),
        (
            lambda: ncjax.gradient_descent(PARAMS, 0.1, 9, save_steps=iter([1])),
            "save_steps must be .* got a list_iterator: pass one array",
        ),
        (
            lambda: ncjax.gradient_descent(
                PARAMS, 0.1, 9, save_steps=np.array([1, 2**63 + 1], np.uint64)
            ),
            r"save_steps must lie in \[0, num_steps = 9\], got",
        ),
        (
            lambda: ncjax.spectral_density(jnp.sum, W[0].astype("f4"), width=1e-60),
            "width must be .* float32",
        ),
        (
            lambda: ncjax.hessian_eig(jnp.sum, {"a": W, "b": np.array([None])}),
            r"params\['b'\] must be an array of numbers, got Python objects",
        ),
        (lambda: ncjax.hvp(jnp.sum, W, "x"), "vector must be an array of numbers, got st"),
    ],
)
def test_arguments_out_of_range_are_refused(function, message):
    with pytest.raises(ValueError, match=message) as caught:
        function()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ((None, H), "W must be an array of numbers, got None"),
        ((W, [*H[:, :, :3], H[0]]), "H must be .* got a list of 4 entries of diff"),
        ((W, np.ma.masked_array(H, H > 0)), "H must be .* masked: take array"),
        ((W.astype(str), H), "W must be an array of numbers, got strings"),
        ((W, H * np.inf), "H must be finite, got 24 of 24 entries .* in float64"),
    ],
)
def test_params_that_are_no_arrays_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        ncjax.kkt(ncjax.Params(*params))


@pytest.mark.parametrize("dtype", [">f8", "<f8", np.longdouble, list])
def test_params_of_other_kinds_match_numpy(dtype):
    given = [x.tolist() if dtype is list else x.astype(dtype) for x in (W, H)]
    expected = np.sum(W**2) + np.sum(H**2)
    np.testing.assert_allclose(ncjax.squared_norm(ncjax.Params(*given)), expected)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-13), ("bfloat16", 0.02)]
)
def test_params_of_pytorch_match_numpy(dtype, tolerance):
    torch = pytest.importorskip("torch")
    given = [torch.tensor(x, requires_grad=True).to(getattr(torch, dtype)) for x in (W, H)]
    exact = [x.detach().double().numpy() for x in given]
    gaps = exact[0][:, None] - exact[0][None]
    expected = np.einsum("kjd,kid->kij", gaps, exact[1])
    got = np.asarray(ncjax.margins(ncjax.Params(*given)), np.float64)
    others = ~np.eye(3, dtype=bool)[:, None, :].repeat(2, axis=1)
    np.testing.assert_allclose(
        got[others], expected[others], rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("kind", ["numpy", "pytorch"])
def test_rows_of_other_kinds_match_numpy(kind):
    rows, mean = W.astype(">f8"), RNG.normal(size=4)
    other = mean.tolist()
    if kind == "pytorch":
        torch = pytest.importorskip("torch")
        rows, other = (torch.tensor(x, requires_grad=True) for x in (W, mean))
    cosines = np.abs(W @ mean) / np.linalg.norm(W, axis=1) / np.linalg.norm(mean)
    np.testing.assert_allclose(ncjax.variants.ood_cosines(rows, other), cosines)
    np.testing.assert_allclose(
        ncjax.variants.one_vs_rest_distances(rows), ncjax.variants.one_vs_rest_distances(W)
    )
    with pytest.raises(ValueError, match=r"expected ood_mean \(4,\), got \(3,\)"):
        ncjax.variants.ood_cosines(W, mean[:3])
