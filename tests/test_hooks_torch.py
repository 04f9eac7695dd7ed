"""The watch of a PyTorch layer: the right layer, the right samples, the right numbers."""

import concurrent.futures

import jax.numpy as jnp
import numpy as np
import pytest
import subprocesses

import ncjax
from ncjax.metrics import collapse

torch = pytest.importorskip("torch", reason="needs requirements-hooks.txt")
nn = torch.nn

from ncjax.torch import watch  # noqa: E402
from ncjax.torch.layers import find_layer  # noqa: E402

K, D, N = 3, 5, 60

pytestmark = pytest.mark.usefixtures("quick_compilation")


def network(bias=True, dtype=None):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, D), nn.Tanh(), nn.Linear(D, K, bias, dtype=dtype))


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(N) % K)
    images = np.eye(K, 4)[labels] + 0.3 * rng.normal(size=(N, 4))
    return torch.tensor(images, dtype=torch.float32), torch.tensor(labels)


def batches(images, labels, sizes=(16, 16, 28)):
    return zip(images.split(sizes), labels.split(sizes), strict=True)


def expected(model, images, labels, **options):
    """Metrics of the features that the layers before the last return."""
    with torch.no_grad():
        features = model[:-1](images).numpy()
    W, b = model[-1].weight, model[-1].bias
    return ncjax.collapse_metrics_from_features(features, labels, W, b, **options)


ONE_PASS = [
    name
    for name in ncjax.CollapseMetrics._fields
    if name not in ("ncc_mismatch", "accuracy")
]


def assert_same(report, metrics, names=ONE_PASS, rtol=1e-5):
    values = report.as_dict()
    for name in names:
        np.testing.assert_allclose(
            values[name], getattr(metrics, name), rtol=rtol, atol=1e-7, err_msg=name
        )


# The layer


class Heads(nn.Module):
    """Two heads that read the same features."""

    def __init__(self, first, second):
        super().__init__()
        self.body = nn.Linear(4, D)
        self.first, self.second = nn.Linear(D, first), nn.Linear(D, second)


class Wrapped(nn.Module):
    """A network inside, as in DistributedDataParallel."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_the_last_linear_layer_of_a_network_is_found():
    assert find_layer(network()).name == "2"
    assert find_layer(Wrapped(network())).name == "module.2"
    assert find_layer(torch.compile(network(), backend="eager")).name == "_orig_mod.2"
    assert find_layer(network(), num_classes=K).num_classes == K
    encoder = nn.TransformerEncoderLayer(D, 1, 7)
    assert find_layer(nn.Sequential(encoder, nn.Linear(D, K))).name == "1"


@pytest.mark.parametrize("module", [nn.Linear(D, K), nn.LazyLinear(K), nn.Conv2d(D, K, 1)])
def test_a_layer_with_a_weight_is_the_last_layer_itself(module):
    found = find_layer(module)
    assert found == ("", module)
    assert found.num_classes in (K, None)


def test_a_layer_is_found_by_its_name_or_the_end_of_it():
    heads = Heads(K, K)
    assert find_layer(heads, "first").module is heads.first
    assert find_layer(Wrapped(heads), "second").module is heads.second
    part = nn.ModuleDict({"classifier": network(), "other": nn.Linear(D, K)})
    assert find_layer(part, "classifier").name == "classifier.2"


def test_the_output_embedding_of_a_language_model_is_its_last_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(D, K)
            self.body = nn.Linear(4, D)

        def get_output_embeddings(self):
            return self.lm_head

    assert find_layer(Wrapped(Model())).name == "module.lm_head"
    assert find_layer(Model(), num_classes=D).name == "body"


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Heads(K, K), {}, r"unique, got first \(5 to 3\), second \(5 to 3\): name it"),
        (Heads(2, K), {}, r"unique, got first \(5 to 2\), second \(5 to 3\): name it"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), {}, "Linear, got Sequential with none"),
        (network(), {"num_classes": 7}, r"7 outputs, got .* 0 \(4 to 5\), 2 \(5 to 3\)"),
        (network()[-1], {"num_classes": 7}, "num_classes is 7 but the last layer has 3"),
        (network(), {"layer": "head"}, "got 'head', which names none: .* 0, 2"),
        (
            nn.ModuleDict({"a": Heads(2, 3), "b": Heads(2, 3)}),
            {"layer": "first"},
            "a.first",
        ),
        (nn.Identity(), {}, "pass the last layer itself"),
        (print, {}, "must be a torch.nn.Module, got builtin_function_or_method"),
    ],
)
def test_a_network_without_one_last_layer_is_refused_with_advice(module, options, message):
    with pytest.raises(ValueError, match=message):
        watch(module, **options)


def test_many_layers_are_listed_in_part():
    deep = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)))
    with pytest.raises(ValueError, match=r"got 4 more, 4 \(3 to 3\)"):
        watch(deep)


# The numbers


def test_a_watched_training_loop_gives_the_metrics_of_the_features(data):
    model, (images, labels) = network(), data
    with torch.no_grad(), watch(model) as watched:
        for x, y in batches(images, labels):
            with watched.labels(y):
                model(x)
        assert_same(watched.compute(), expected(model, images, labels))
        with watched.second_pass():
            for x, y in batches(images, labels, (30, 30)):
                model(x)
                watched.update(y)
        report = watched.compute()
    assert_same(report, expected(model, images, labels), ncjax.CollapseMetrics._fields)
    assert watched.compute().as_dict() == report.as_dict()


def test_samples_after_a_second_pass_belong_to_the_first_again(data):
    model, (images, labels) = network(), data
    watched = watch(model)
    with watched.labels(labels[:40]):
        model(images[:40])
    with watched.second_pass(), watched.labels(labels[:40]):
        model(images[:40])
    with watched.labels(labels[40:]):
        model(images[40:])
    report = watched.compute()
    assert_same(report, expected(model, images, labels))
    assert np.isnan(report.metrics.ncc_mismatch)


def test_a_second_pass_over_other_samples_is_refused(data):
    model, (images, labels) = network(), data
    watched = watch(model)
    with watched.labels(labels):
        model(images)
    with watched.second_pass(), watched.labels(labels[:40]):
        model(images[:40])
    with pytest.raises(ValueError, match="the second pass must read the samples"):
        watched.compute()


def test_a_second_pass_that_fails_leaves_the_first(data):
    model, (images, labels) = network(), data
    watched = watch(model)
    with watched.labels(labels):
        model(images)
    with pytest.raises(KeyError), watched.second_pass(), watched.labels(labels):
        raise KeyError
    assert_same(watched.compute(), expected(model, images, labels))


def test_given_centres_decide_nc4_of_a_test_split(data):
    model, (images, labels) = network(), data
    train, test = slice(0, 40), slice(40, N)
    seen, held_out = watch(model), watch(model)
    with torch.no_grad():
        model(images[train])
        seen.update(labels[train])
        model(images[test])
        held_out.update(labels[test])
        centres = seen.meter.class_means
        with held_out.second_pass(centres):
            model(images[test])
            held_out.update(labels[test])
    metrics = expected(model, images[test], labels[test], centres=centres)
    assert_same(held_out.compute(), metrics, ncjax.CollapseMetrics._fields)


def test_the_weight_is_read_when_the_report_is_computed(data):
    model, (images, labels) = network(), data
    watched = watch(model)
    model(images)
    watched.update(labels)
    with torch.no_grad():
        model[-1].weight.mul_(torch.tensor([[1.0], [2.0], [3.0]]))
    assert_same(watched.compute(), expected(model, images, labels))


def test_every_forward_pass_of_a_block_has_its_labels(data):
    model, (images, labels) = network(), data
    watched = watch(model)
    with watched.labels(labels):
        model(images)
        model(images + 0.1)
    both = torch.cat([images, images + 0.1]), torch.cat([labels, labels])
    assert_same(watched.compute(), expected(model, *both))


def test_without_a_block_only_the_last_forward_pass_counts(data):
    model, (images, labels) = network(), data
    watched = watch(model)
    model(images + 1)
    model(images)
    watched.update(labels)
    assert_same(watched.compute(), expected(model, images, labels))


def test_a_block_that_fails_adds_nothing(data):
    model, (images, labels) = network(), data
    watched = watch(model)
    model(images)
    watched.update(labels)

    def two_passes():
        with watched.labels(labels):
            model(images)
            model(images[:, :2])

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        two_passes()
    assert watched.compute().as_dict()["samples"] == N


def test_accumulated_gradients_change_nothing_and_get_none_from_the_watch(data):
    model, (images, labels) = network(), data
    watched = watch(model)
    for x, y in batches(images, labels):
        with watched.labels(y):
            logits = model(x)
        nn.functional.cross_entropy(logits, y).backward()
    assert_same(watched.compute(), expected(model, images, labels))
    assert watched.meter.class_means.shape == (K, D)


def test_autocast_features_are_measured_as_they_are(data):
    model, (images, labels) = network(), data
    watched = watch(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = model[:-1](images)
        model(images)
    watched.update(labels)
    assert features.dtype == torch.bfloat16
    metrics = ncjax.collapse_metrics_from_features(
        features.float(), labels, model[-1].weight, model[-1].bias
    )
    assert_same(watched.compute(), metrics, rtol=1e-4)


def test_a_compiled_network_is_measured(data):
    model, (images, labels) = network(), data
    watched = watch(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for x, y in batches(images, labels):
        with watched.labels(y):
            compiled(x)
    assert_same(watched.compute(), expected(model, images, labels))


def test_masked_and_ignored_samples_are_left_out(data):
    model, (images, labels) = network(), data
    watched, kept = watch(model), torch.arange(N) % 4 != 0
    model(images)
    watched.update(labels, mask=kept)
    metrics = expected(model, images[kept], labels[kept])
    assert_same(watched.compute(), metrics)
    watched.reset()
    with watched.labels(torch.where(kept, labels, -100)):
        model(images)
    assert_same(watched.compute(), metrics)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray, list])
def test_labels_of_any_library_are_read(data, convert):
    model, (images, labels) = network(), data
    watched = watch(model)
    with watched.labels(convert(labels.numpy())):
        model(images)
    assert_same(watched.compute(), expected(model, images, labels))


def test_sequences_are_measured_position_by_position(data):
    model, (images, labels) = network(), data
    watched = watch(model)
    with watched.labels(labels.view(6, 10)):
        model(images.view(6, 10, 4))
    assert_same(watched.compute(), expected(model, images, labels))


def test_shifted_labels_go_with_the_position_before(data):
    model, (images, labels) = network(), data
    watched = watch(model, shift=True)
    tokens = labels.view(6, 10)
    with watched.labels(tokens):
        model(images.view(6, 10, 4))
    before = images.view(6, 10, 4)[:, :-1].reshape(-1, 4)
    assert_same(watched.compute(), expected(model, before, tokens[:, 1:].reshape(-1)))


def test_a_convolution_of_size_one_is_a_linear_layer_at_each_pixel(data):
    model, (images, labels) = network(), data
    head = nn.Conv2d(D, K, 1)
    with torch.no_grad():
        head.weight.copy_(model[-1].weight[:, :, None, None])
        head.bias.copy_(model[-1].bias)
        pixels = model[:-1](images).T.reshape(D, 2, 3, 10).movedim(0, 1)
    watched = watch(head)
    with watched.labels(labels.view(2, 3, 10)):
        head(pixels)
    assert_same(watched.compute(), expected(model, images, labels))


def test_a_lazy_layer_is_measured_after_its_first_call(data):
    model, (images, labels) = network(), data
    lazy = nn.Sequential(*model[:-1], nn.LazyLinear(K))
    watched = watch(lazy)
    with watched.labels(labels):
        lazy(images)
    assert_same(watched.compute(), expected(lazy, images, labels))


def test_a_layer_without_weight_leaves_the_metrics_of_the_classifier_undefined(data):
    model, (images, labels) = network(), data
    model.insert(2, nn.Identity())
    watched = watch(model[2], num_classes=K)
    with watched.labels(labels):
        model(images)
    report = watched.compute().as_dict()
    assert np.isnan(report["self_duality"])
    metrics = expected(model, images, labels)
    np.testing.assert_allclose(report["cdnv"], metrics.cdnv, rtol=1e-5)
    with (
        pytest.raises(ValueError, match="watch the last linear layer"),
        watched.second_pass(),
    ):
        pass


def test_processes_gather_the_samples_of_all(tmp_path):
    programs = [
        subprocesses.command("gathered_watch", str(rank), str(tmp_path / "store"))
        for rank in range(2)
    ]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        printed = [text.split() for text in pool.map(subprocesses.output, programs)]
    features = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    first = ncjax.statistics.class_statistics(features, np.arange(40) % 3, 3)
    cdnv = collapse.class_distance_normalised_variance(first)
    for text in printed:
        np.testing.assert_allclose(float(text[0]), cdnv, rtol=1e-5)
        assert float(text[1]) == 40


def test_gathering_in_one_process_changes_nothing(data):
    model, (images, labels) = network(), data
    watched = watch(model)
    model(images)
    watched.update(labels)
    watched.gather()
    assert watched.compute().as_dict()["samples"] == N


# The life of a watch


def test_a_closed_watch_keeps_its_numbers_and_leaves_the_network(data):
    model, (images, labels) = network(), data
    with watch(model) as watched:
        model(images)
        watched.update(labels)
    model(images + 1)
    with pytest.raises(ValueError, match="must see a forward pass"):
        watched.update(labels)
    assert_same(watched.compute(), expected(model, images, labels))
    assert not model[-1]._forward_pre_hooks


def test_epochs_become_a_table_and_a_figure(data, tmp_path):
    model, (images, labels) = network(), data
    watched = watch(model)
    reports = []
    for shift in (0.0, 0.5):
        with watched.labels(labels):
            model(images + shift)
        reports.append(watched.end_epoch())
    assert len(watched.history) == 2
    assert [row["epoch"] for row in watched.history] == [1, 2]
    cdnv = [report.as_dict()["cdnv"] for report in reports]
    np.testing.assert_array_equal(watched.history.columns()["cdnv"], cdnv)
    assert str(watched.history).splitlines()[0].split()[:3] == ["epoch", "NC1", "CDNV"]
    watched.history.plot(tmp_path / "collapse.png")
    assert (tmp_path / "collapse.png").read_bytes()[1:4] == b"PNG"
    assert repr(watched) == "Watch(layer='2', num_classes=3)"


def test_misuse_is_refused_with_advice(data):
    model, (images, labels) = network(), data
    watched = watch(model)
    with pytest.raises(ValueError, match="must see a sample first"):
        watched.compute()
    with pytest.raises(ValueError, match="call the watched network first"):
        watched.update(labels)
    with pytest.raises(ValueError, match="must see a forward pass"), watched.labels(labels):
        pass
    for given, message in (
        (labels[:7], r"expected labels \(60,\) for features \(60, 5\), got \(7,\): give"),
        (nn.functional.one_hot(labels), r"got \(60, 3\): take labels.argmax\(-1\)"),
        (labels[:, None], r"got \(60, 1\): take labels\[..., 0\]"),
    ):
        with pytest.raises(ValueError, match=message), watched.labels(given):
            model(images)
    with pytest.raises(ValueError, match="pool before"), watched.labels(labels[:6]):
        model(images.view(6, 10, 4))
    with (
        pytest.raises(ValueError, match="expected mask"),
        watched.labels(labels, labels[:3]),
    ):
        model(images)
    shifted = watch(model, shift=True)
    with pytest.raises(ValueError, match="leave shift out"), shifted.labels(labels):
        model(images)
