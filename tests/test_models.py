"""The networks agree with torchvision for equal weights, and keep their contract."""

import importlib
import json
import math
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_transfer import (
    CASES,
    STORED,
    STORED_FEATURES,
    TRAINED,
    filled,
    state_dict,
    uniforms,
)

from ncjax.networks import models
from ncjax.networks.convolution import convolve

pytestmark = pytest.mark.usefixtures("quick_compilation", "full_precision")

REFERENCE = Path(__file__).parent / "data" / "torchvision_logits.json"
TORCHVISION = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "vgg11": 132_868_840,
    "vgg13": 133_053_736,
    "vgg16": 138_365_992,
    "vgg19": 143_678_248,
}
CIFAR = {
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "vgg11": 9_231_114,
    "vgg13": 9_416_010,
    "vgg16": 14_728_266,
    "vgg19": 20_040_522,
}
# One network of every kind, quick to compile and run.
SMALL = {
    "resnet18": ("resnet18", {"width": 1 / 16}),
    "vgg11": ("vgg11", {"width": 1 / 16}),
    "vgg11-mlp": ("vgg11", {"width": 1 / 16, "head": "mlp"}),
    "mlp": ("mlp", {"width": 1 / 8}),
    "convnet": ("convnet", {"width": 1 / 4}),
}
# Full-size networks, for tests that need only shapes.
EVERY = {
    **{name: (name, {}) for name in ("resnet18", "resnet50", "vgg11", "mlp", "convnet")},
    "resnet18-imagenet": ("resnet18", {"stem": "imagenet"}),
    "vgg11-mlp": ("vgg11", {"head": "mlp"}),
}
K = 5
SHAPE = (32, 32, 3)

every_network = pytest.mark.parametrize("network", EVERY)
small_network = pytest.mark.parametrize("network", SMALL)


@pytest.fixture(scope="module")
def peers():
    reason = "torch and torchvision are not installed: pip install torch torchvision"
    for module in ("torch", "torchvision"):
        pytest.importorskip(module, reason=reason)
    import make_torch_reference

    return make_torch_reference


def images(number=3, shape=SHAPE):
    return jnp.asarray(2 * uniforms("images", (number, *shape)) - np.float32(1))


@cache
def small(network, **options):
    """Variables of a network, and its outputs as a function of these and images."""
    name, others = SMALL[network]
    model = models.build(name, K, **others, **options)
    return filled(model, SHAPE), jax.jit(model.apply)


def to_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def shapes(tree):
    """Shapes by "params/conv1/kernel" and the like."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in leaves
    }


@cache
def outputs(name):
    case = CASES[name]
    return to_numpy(jax.jit(case.build().apply)(case.variables(), case.images()))


def assert_near(got, expected, tol, err_msg=""):
    """Compare up to `tol` times the largest expected entry."""
    assert got.shape == expected.shape, err_msg
    bound = tol * np.max(np.abs(expected))
    np.testing.assert_allclose(got, expected, rtol=0, atol=bound, err_msg=err_msg)


@pytest.mark.parametrize("name", TORCHVISION)
def test_parameter_counts_are_the_published_ones(name):
    option = {"stem": "imagenet"} if name.startswith("resnet") else {"head": "mlp"}
    model = models.build(name, 1000, **option)
    assert models.count_parameters(model, (224, 224, 3)) == TORCHVISION[name]
    assert models.count_parameters(models.build(name, 10), SHAPE) == CIFAR[name]


@pytest.mark.parametrize("name", STORED)
def test_outputs_equal_torchvision_as_stored(name):
    record = json.loads(REFERENCE.read_text())
    assert set(record["outputs"]) == set(STORED)
    stored = {kind: np.array(rows) for kind, rows in record["outputs"][name].items()}
    logits, features = outputs(name)
    assert_near(logits, stored["logits"], 1e-5)
    assert_near(features[:, :STORED_FEATURES], stored["features"], 1e-5)


@pytest.mark.parametrize(
    "name",
    [n for n in CASES if n != "vgg11-mlp"]
    + [pytest.param("vgg11-mlp", marks=pytest.mark.slow)],
)
def test_outputs_equal_torchvision(name, peers):
    case = CASES[name]
    expected = peers.forward(peers.peer(case, case.variables()), case.images())
    for got, array, kind in zip(
        outputs(name), expected, ("logits", "features"), strict=True
    ):
        assert_near(got, array, 1e-5, kind)


@pytest.mark.parametrize("case", TRAINED.values(), ids=TRAINED)
def test_a_training_step_equals_torchvision(case, peers):
    """The loss, its gradient for every parameter, and the running statistics."""
    import torch

    model, variables = case.build(), case.variables()
    labels = np.arange(case.num_images)

    def loss(params):
        (logits, _), updated = model.apply(
            {"params": params, "batch_stats": variables["batch_stats"]},
            case.images(),
            train=True,
            mutable=["batch_stats"],
        )
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
        return -jnp.mean(picked), updated

    (value, updated), grad = to_numpy(
        jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    )

    module = peers.peer(case, variables).train()
    per_channel = {}
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.register_forward_hook(
                lambda layer, args, _, name=name: per_channel.update(
                    {name: args[0].numel() // layer.num_features}
                )
            )
    logits = module(peers.batch(case.images()))
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    expected.backward()

    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    theirs = {name: p.grad.numpy() for name, p in module.named_parameters()}
    ours = state_dict({"params": grad})
    assert ours.keys() == theirs.keys()
    largest = max(np.max(np.abs(array)) for array in theirs.values())
    for name, array in theirs.items():
        # A bias before a normalisation has no gradient at all.
        bound = 1e-4 * np.max(np.abs(array)) + 1e-6 * largest
        np.testing.assert_allclose(ours[name], array, rtol=0, atol=bound, err_msg=name)

    old = state_dict({"batch_stats": variables["batch_stats"]})
    new = state_dict(updated)
    buffers = {name: array.numpy() for name, array in module.named_buffers()}
    assert new.keys() == buffers.keys()
    for name, n in per_channel.items():
        mean, var = f"{name}.running_mean", f"{name}.running_var"
        assert_near(new[mean], buffers[mean], 1e-5, mean)
        # PyTorch keeps the unbiased variance.
        biased = 0.9 * old[var] + (buffers[var] - 0.9 * old[var]) * (n - 1) / n
        assert_near(new[var], biased, 1e-5, var)


@small_network
def test_logits_are_the_classifier_applied_to_the_features(network):
    variables, apply = small(network)
    logits, features = to_numpy(apply(variables, images()))
    classifier = variables["params"]["classifier"]
    assert logits.shape == (3, K)
    assert classifier["kernel"].shape == (features.shape[1], K)
    products = features.astype(float) @ classifier["kernel"].astype(float)
    assert_near(logits, products + classifier["bias"], 1e-6)


def test_logits_without_bias():
    variables, apply = small("mlp", use_bias=False)
    logits, features = to_numpy(apply(variables, images()))
    kernel = variables["params"]["classifier"]["kernel"]
    assert_near(logits, features.astype(float) @ kernel.astype(float), 1e-6)


@every_network
def test_only_the_classifier_loses_its_bias(network):
    name, options = EVERY[network]
    usual, got = (
        shapes(models.abstract_variables(models.build(name, K, **options, **more), SHAPE))
        for more in ({}, {"use_bias": False})
    )
    del usual["params/classifier/bias"]
    assert got == usual


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@every_network
def test_variables_and_outputs_are_float32(network, dtype):
    name, options = EVERY[network]
    model = models.build(name, K, **options, dtype=dtype)
    variables = models.abstract_variables(model, SHAPE)

    @jax.jit
    def train(variables, batch):
        return model.apply(variables, batch, train=True, mutable=["batch_stats"])

    trees = [variables]
    for given in (jnp.float64, jnp.uint8):
        batch = jax.ShapeDtypeStruct((3, *SHAPE), given)
        trees += [jax.eval_shape(f, variables, batch) for f in (model.apply, train)]
    for tree in trees:
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype("float32")}


@small_network
def test_bfloat16_is_near_float32(network):
    exact, rounded = (
        to_numpy(apply(variables, images()))
        for variables, apply in (small(network), small(network, dtype=jnp.bfloat16))
    )
    for a, b in zip(exact, rounded, strict=True):
        assert_near(b, a, 0.05)
        assert np.max(np.abs(a - b)) > 1e-4 * np.max(np.abs(a))  # it is another dtype


@pytest.mark.parametrize(
    ("name", "options", "dim"),
    [
        ("resnet18", {}, 512),
        ("resnet50", {}, 2048),
        ("vgg13", {}, 512),
        ("vgg13", {"head": "mlp"}, 4096),
        ("mlp", {}, 512),
        ("convnet", {}, 128),
    ],
)
def test_width_multiplies_the_numbers_of_channels_and_units(name, options, dim):
    shape = (40, 48, 2)
    full = shapes(models.abstract_variables(models.build(name, K, **options), shape))
    assert full["params/classifier/kernel"] == (dim, K)
    for width in (0.25, 1.5):
        model = models.build(name, K, width=width, **options)
        got = shapes(models.abstract_variables(model, shape))
        assert got.keys() == full.keys()
        assert got["params/classifier/kernel"] == (width * dim, K)
        for leaf, whole in full.items():
            if "classifier" not in leaf:
                assert got[leaf][-1] == width * whole[-1], leaf
    least = models.abstract_variables(models.build(name, K, width=1e-9, **options), shape)
    expansion = 4 if name == "resnet50" else 1
    assert least["params"]["classifier"]["kernel"].shape == (expansion, K)


@small_network
def test_evaluation_of_an_image_does_not_depend_on_the_batch(network):
    variables, apply = small(network)
    together = to_numpy(apply(variables, images()))
    for i in range(3):
        alone = to_numpy(apply(variables, images()[i : i + 1]))
        for got, whole in zip(alone, together, strict=True):
            assert_near(got, whole[i : i + 1], 1e-5)


def test_training_normalises_over_the_batch_and_updates_its_averages():
    model = models.build("convnet", K, width=1 / 4)
    variables = filled(model, SHAPE)

    @jax.jit
    def train(x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    (logits, _), updated = to_numpy(train(images()))
    assert shapes(updated) == shapes({"batch_stats": variables["batch_stats"]})
    y = np.asarray(
        convolve(images(), jnp.asarray(variables["params"]["conv1"]["kernel"]), 1, 1), float
    )
    old, new = variables["batch_stats"]["bn1"], updated["batch_stats"]["bn1"]
    for kind, now in (("mean", y.mean((0, 1, 2))), ("var", y.var((0, 1, 2)))):
        assert_near(new[kind], 0.9 * old[kind] + 0.1 * now, 1e-5, kind)

    (others, _), _ = to_numpy(train(images().at[2].set(0.5)))
    assert np.all(np.abs(others - logits)[:2] > 1e-3)
    # Scale and brightness of the images are normalised away, as in no evaluation.
    (bright, _), _ = to_numpy(train(3 * images()))
    assert_near(bright, logits, 1e-3)


def initial(name, **options):
    model = models.build(name, K, **options)
    variables = jax.jit(model.init)(jax.random.key(1), images(1))
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


def assert_drawn(kernel, deviation, uniform, leaf):
    """Test mean 0, the standard deviation, and normal or uniform, within 5 sigma."""
    inside = math.sqrt(1 / 3) if uniform else math.erf(math.sqrt(0.5))
    spread = 5 / math.sqrt(kernel.size)
    assert abs(kernel.mean()) < spread * deviation, leaf
    assert abs(kernel.std() / deviation - 1) < spread / math.sqrt(2), leaf
    within = np.mean(np.abs(kernel) < deviation)
    assert abs(within - inside) < spread * math.sqrt(inside * (1 - inside)), leaf
    if uniform:
        assert np.max(np.abs(kernel)) <= math.sqrt(3) * deviation * (1 + 1e-6), leaf


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"width": 0.25}),
        ("vgg11", {"width": 0.25}),
        ("vgg11", {"width": 0.25, "head": "mlp"}),
        ("mlp", {}),
        ("convnet", {}),
    ],
)
def test_initial_weights_have_their_distributions(name, options):
    variables = initial(name, **options)
    fixed = {"scale": 1, "mean": 0, "var": 1}
    seen = set()
    for leaf, array in variables.items():
        kind = leaf.rsplit("/", 1)[-1]
        if array.ndim == 4:  # He et al. (2015), by the outputs
            height, width, _, channels = array.shape
            assert_drawn(array, math.sqrt(2 / (height * width * channels)), False, leaf)
        elif array.ndim == 2 and options.get("head") == "mlp":
            assert_drawn(array, 0.01, False, leaf)
        elif array.ndim == 2:  # uniform up to 1 / sqrt(inputs)
            assert_drawn(array, 1 / math.sqrt(3 * array.shape[0]), True, leaf)
        elif kind != "bias" or "classifier" not in leaf:
            np.testing.assert_array_equal(array, fixed.get(kind, 0), err_msg=leaf)
        if kind == "kernel":
            seen.add(array.flat[0])
    assert len(seen) == sum(leaf.endswith("kernel") for leaf in variables)


@pytest.mark.parametrize(
    ("name", "num_classes", "options", "message"),
    [
        ("resnet20", K, {}, "model must be one of resnet18, .* got 'resnet20'"),
        ("resnet18", 1, {}, "num_classes must be .*at least 2, got 1"),
        ("vgg11", 0, {}, "num_classes must be .*at least 2, got 0"),
        (
            "resnet18",
            K,
            {"stem": "tiny"},
            "stem must be one of cifar, imagenet, got 'tiny'",
        ),
        ("vgg11", K, {"head": "conv"}, "head must be one of linear, mlp, got 'conv'"),
        (
            "resnet18",
            K,
            {"head": "mlp"},
            "resnet18 has no option head; it has depths, dtype, stem",
        ),
        (
            "vgg11",
            K,
            {"stem": "cifar"},
            "vgg11 has no option stem; it has depths, dtype, head",
        ),
        ("mlp", K, {"dropout": 0.5}, "mlp has no option dropout; it has dtype, hidden"),
        ("mlp", K, {"width": 0.0}, "width must be positive and finite, got 0"),
        ("convnet", K, {"width": -1.0}, "width must be positive and finite, got -1"),
        ("resnet18", K, {"width": math.nan}, "width must be positive and finite, got nan"),
        ("vgg11", K, {"width": math.inf}, "width must be positive and finite, got inf"),
    ],
)
def test_bad_networks_are_named(name, num_classes, options, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, num_classes, **options)


def test_images_too_small_are_named():
    for shape in ((28, 28, 1), (32, 31, 3)):
        height, width = shape[:2]
        model = models.build("vgg11", K, width=1 / 16)
        message = f"VGG needs images of 32x32 or larger, got {height}x{width}: pad"
        with pytest.raises(ValueError, match=message):
            models.abstract_variables(model, shape)
        with pytest.raises(ValueError, match=message):
            models.count_parameters(model, shape)
    with pytest.raises(ValueError, match=r"1x2 .* smaller than the window of 2x2"):
        models.abstract_variables(models.build("convnet", K), (7, 8, 3))
    with pytest.raises(ValueError, match=r"expected x \(B, height, width, C\)"):
        models.build("resnet18", K).init(jax.random.key(0), jnp.zeros((32, 32, 3)))


@pytest.mark.parametrize("grid", [1, 3, 7])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7), (6, 10), (6, 8), (10, 14)])
def test_adaptive_mean_matches_the_definition(size, grid):
    x = np.random.default_rng(0).normal(size=(2, *size, 3))
    expected = np.zeros((2, grid, grid, 3))
    for p in range(grid):
        for q in range(grid):
            top, left = (
                math.floor(i * n / grid) for i, n in zip((p, q), size, strict=True)
            )
            bottom, right = (
                math.ceil((i + 1) * n / grid) for i, n in zip((p, q), size, strict=True)
            )
            expected[:, p, q] = x[:, top:bottom, left:right].mean((1, 2))
    np.testing.assert_allclose(
        models.adaptive_mean(jnp.asarray(x), grid), expected, rtol=1e-12, atol=1e-14
    )
    half = models.adaptive_mean(jnp.asarray(x, jnp.bfloat16), grid)
    assert half.dtype == jnp.bfloat16
    assert_near(np.asarray(half, float), expected, 0.03)


@pytest.mark.parametrize("package", ["flax", "orbax.checkpoint", "sklearn"])
def test_without_a_package_the_import_names_the_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "ncjax.networks")
    message = rf"^{package} not found: pip install 'ncjax\[networks\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        importlib.import_module("ncjax.networks")
