"""Layers of a PyTorch network are recorded batch by batch."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs requirements-hooks.txt")

from ncjax.torch import record_layers  # noqa: E402


@pytest.fixture
def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 2),
        torch.nn.ReLU(inplace=True),
        torch.nn.Flatten(),
        torch.nn.Linear(27, 2),
    ).eval()


def run(network, images, **settings):
    with torch.no_grad(), record_layers(network, **settings) as recorded:
        for batch in torch.as_tensor(images).split(4):
            network(batch)
    return recorded.features()


def test_torch_layers_are_recorded_batch_by_batch_before_they_are_overwritten(network):
    images = np.random.default_rng(0).normal(size=(10, 1, 4, 4)).astype(np.float32)
    found = run(network, images, layers=["0", network[1], "3"])
    assert list(found) == ["0", "1", "3"]
    with torch.no_grad():
        first = network[0](torch.as_tensor(images)).numpy()
        last = network(torch.as_tensor(images)).numpy()
    np.testing.assert_allclose(found["0"], first.reshape(10, -1), rtol=1e-5)
    assert found["0"].min() < 0  # the ReLU has overwritten the memory since
    np.testing.assert_allclose(found["1"], np.maximum(first, 0).reshape(10, -1), rtol=1e-5)
    np.testing.assert_allclose(found["3"], last, rtol=1e-5)
    pooled = run(network, images, layers={"a": "0"}, pooling="channels_first")
    np.testing.assert_allclose(pooled["a"], first.mean(axis=(2, 3)), rtol=1e-5)
    inputs = run(network, images, layers=["3"], side="input")
    np.testing.assert_array_equal(inputs["3"], found["1"])
    assert list(run(network, images)) == ["0", "1", "2", "3"]
    assert not any(module._forward_hooks for module in network.modules())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_torch_outputs_of_several_parts_and_half_precision_are_read():
    class Pair(torch.nn.Module):
        def forward(self, x=None):
            return {"hidden": (None, x.bfloat16()), "rest": x}

    network = torch.nn.Sequential(Pair())
    images = np.ones((4, 2), np.float32)
    with record_layers(network) as recorded:
        network[0](x=torch.as_tensor(images))
    np.testing.assert_array_equal(recorded.features()["0"].astype(np.float32), images)
    recorded.clear()
    with pytest.raises(ValueError, match="layer '0' has recorded nothing"):
        recorded.features()


def test_torch_layers_that_cannot_be_recorded_are_named(network):
    images = np.ones((4, 1, 4, 4), np.float32)
    for settings, message in (
        ({"layers": ["conv"]}, "the model has no layer 'conv': model.named_modules"),
        ({"layers": [torch.nn.ReLU()]}, r"the model has no layer ReLU\(\)"),
        ({"layers": "0"}, "must be a list of names or modules, or a dict, got '0'"),
        ({"layers": []}, "layers is empty"),
        ({"layers": ["0", network[0]]}, "layers has '0' twice"),
        ({"side": "both"}, "side must be one of output, input"),
        ({"pooling": "mean"}, "pooling must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            run(network, images, **settings)
    twice = torch.nn.Sequential(network[0], network[1], network[1])
    with pytest.raises(ValueError, match="has recorded 8 samples, but '0' 4"):
        run(twice, images)
