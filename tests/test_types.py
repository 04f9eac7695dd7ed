import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ncjax
from ncjax.checks import check_params


def test_init_has_the_requested_shapes_dtype_and_scale(key):
    params = ncjax.init_params(key, 40, 30, 50, scale=0.3)
    assert params.W.shape == (40, 50)
    assert params.H.shape == (40, 30, 50)
    assert params.W.dtype == params.H.dtype == jnp.float64
    assert float(jnp.std(params.H)) == pytest.approx(0.3, rel=0.01)
    assert float(jnp.std(params.W)) == pytest.approx(0.3, rel=0.05)


def test_init_depends_on_the_key_alone(key):
    same = ncjax.init_params(key, 3, 2, 4), ncjax.init_params(key, 3, 2, 4)
    other = ncjax.init_params(jax.random.key(1), 3, 2, 4)
    chex.assert_trees_all_equal(*same)
    assert not np.allclose(same[0].H, other.H)


def test_init_maps_over_keys_and_takes_float32(key):
    def start(key):
        return ncjax.init_params(key, 3, 2, 4, dtype=jnp.float32)

    starts = jax.vmap(start)(jax.random.split(key, 5))
    assert starts.H.shape == (5, 3, 2, 4)
    assert starts.H.dtype == jnp.float32


@pytest.mark.parametrize("name", ["num_classes", "per_class", "dim"])
@pytest.mark.parametrize("size", [0, -3, 1.5, True])
def test_init_names_the_size_out_of_range(key, name, size):
    sizes = {"num_classes": 3, "per_class": 2, "dim": 4} | {name: size}
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least"):
        ncjax.init_params(key, **sizes)


def test_init_refuses_a_single_class(key):
    with pytest.raises(ValueError, match="num_classes must be an integer of at least 2"):
        ncjax.init_params(key, 1, 2, 4)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_init_refuses_a_bad_scale(key, scale):
    with pytest.raises(ValueError, match="scale must be finite and not negative"):
        ncjax.init_params(key, 3, 2, 4, scale=scale)


def test_init_explains_what_a_key_is():
    with pytest.raises(ValueError, match=r"a PRNG key, such as jax.random.key\(7\)"):
        ncjax.init_params(7, 3, 2, 4)


def test_init_refuses_an_integer_dtype(key):
    with pytest.raises(ValueError, match="dtype must be floating, got int32"):
        ncjax.init_params(key, 3, 2, 4, dtype=jnp.int32)


def test_init_of_float64_without_x64_is_refused(key):
    with jax.enable_x64(False), pytest.raises(ValueError, match="jax_enable_x64"):
        ncjax.init_params(key, 3, 2, 4, dtype=np.float64)


def test_init_warns_if_no_simplex_etf_fits(key):
    with pytest.warns(UserWarning, match="no simplex ETF fits"):
        ncjax.init_params(key, 5, 2, 3)


@pytest.mark.parametrize(
    ("W", "H", "message"),
    [
        (np.ones((3, 4)), np.ones((3, 2, 5)), r"got W \(3, 4\) and H \(3, 2, 5\)"),
        (np.ones((3, 4)), np.ones((2, 2, 4)), r"got W \(3, 4\) and H \(2, 2, 4\)"),
        (np.ones(3), np.ones((3, 2, 4)), r"got W \(3,\)"),
        (np.ones((5, 3, 4)), np.ones((5, 3, 2, 4)), "for 5 models .* use jax.vmap"),
        (np.ones((3, 4)), np.ones((6, 4)), r"H \(6, 4\): ncjax.peel sorts features"),
        (
            np.ones((1, 4)),
            np.ones((1, 2, 4)),
            "num_classes must be an integer of at least 2",
        ),
        (np.ones((3, 4), int), np.ones((3, 2, 4), int), "one floating dtype, got W int64"),
        (np.ones((3, 4), np.float32), np.ones((3, 2, 4)), "got W float32 and H float64"),
    ],
)
def test_params_of_mismatched_shapes_are_named(W, H, message):
    with pytest.raises(ValueError, match=message):
        check_params(ncjax.Params(W, H))


def test_params_of_another_kind_are_named():
    with pytest.raises(ValueError, match=r"expected ncjax.Params\(W, H\), got ndarray"):
        check_params(np.ones((3, 4)))


def test_infinite_params_are_counted():
    params = ncjax.Params(jnp.ones((3, 4)), jnp.ones((3, 2, 4)).at[0, 0, :2].set(jnp.nan))
    with pytest.raises(ValueError, match="H must be finite, got 2 of 24 entries"):
        check_params(params, finite=True)


def test_a_scale_beyond_the_dtype_is_refused(key):
    for dtype, scale in ((jnp.float16, 1e5), (jnp.float32, 1e39), (jnp.float64, np.inf)):
        with pytest.raises(ValueError, match="scale must be finite and not negative in"):
            ncjax.init_params(key, 3, 2, 4, scale=scale, dtype=dtype)
