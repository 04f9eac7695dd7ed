"""Data sets: scikit-learn's digits, small TFDS sets whole and broken, real images."""

import importlib.util
import io
import json
import os
import re
import shutil
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from http.client import BadStatusLine
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_tfds
import subprocesses
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from ncjax.networks import chunks, data

TRAIN = small_tfds.noise(0, 24, (28, 28, 1))
TEST = small_tfds.noise(1, 6, (28, 28, 1))
COLOUR = small_tfds.noise(2, 12, (32, 32, 3))
FIRST = 10  # samples in the first of the two shards of TRAIN
SHARD = "mnist-train.array_record-00001-of-00002"
INFO = "dataset_info.json"


def part(samples, start, stop):
    return small_tfds.Samples(*(array[start:stop] for array in samples))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A read-only data directory with mnist in two shards and cifar10."""
    root = tmp_path_factory.mktemp("tfds")
    train = [part(TRAIN, 0, FIRST), part(TRAIN, FIRST, None)]
    small_tfds.write_samples(root, "mnist", "3.0.1", {"train": train, "test": [TEST]})
    small_tfds.write_samples(root, "cifar10", "3.0.2", {"train": [COLOUR]})
    return root


@pytest.fixture
def own(prepared, tmp_path):
    """A copy of mnist that a test may break, and its folder."""
    shutil.copytree(prepared / "mnist", tmp_path / "mnist")
    return tmp_path, tmp_path / "mnist" / "3.0.1"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(data, "_has_network", lambda: False)


def assert_holds(dataset, samples):
    assert dataset.images.dtype == np.uint8
    assert dataset.labels.dtype == np.int32
    np.testing.assert_array_equal(dataset.images, samples.images)
    np.testing.assert_array_equal(dataset.labels, samples.labels)


def digits():
    """Images of scikit-learn, from 0 to 16, and labels."""
    bunch = load_digits()
    return bunch.images, bunch.target


# The digits


def test_digits_equal_scikit_learn():
    train, test = data.load("digits", "train"), data.load("digits", "test")
    assert (len(train.images), len(test.images)) == (1437, 360)
    assert train.num_classes == test.num_classes == 10
    images, labels = digits()
    whole = np.concatenate([train.images, test.images])
    assert whole.shape == (1797, 8, 8, 1)
    assert (whole.min(), whole.max()) == (0, 255)
    np.testing.assert_array_equal(np.rint(whole[..., 0] * (16 / 255)), images)
    assert train.labels.dtype == np.int32
    np.testing.assert_array_equal(np.concatenate([train.labels, test.labels]), labels)


@pytest.mark.parametrize(
    ("split", "index"),
    [
        ("train[:20%]", range(287)),
        ("train[-3:]", range(1434, 1437)),
        ("test[50%:]", range(1437 + 180, 1797)),
        ("test[1:3]+train[:2]", [1438, 1439, 0, 1]),
        ("train+test", range(1797)),
        ("all", range(1797)),
        ("train[0shard]", range(1437)),
    ],
)
def test_splits_of_the_digits_select_their_samples(split, index):
    images, labels = digits()
    dataset = data.load("digits", split)
    np.testing.assert_array_equal(dataset.labels, labels[index])
    np.testing.assert_array_equal(
        np.rint(dataset.images[..., 0] * (16 / 255)), images[index]
    )


# TFDS sets


@pytest.mark.parametrize(
    ("name", "split", "samples"),
    [
        ("mnist", "train", TRAIN),
        ("mnist", "test", TEST),
        ("mnist:3.0.1", "train[9:12]", part(TRAIN, 9, 12)),
        ("mnist", "train[:25%]", part(TRAIN, 0, 6)),
        ("mnist", "train[:1shard]", part(TRAIN, 0, FIRST)),
        ("cifar10", "train", COLOUR),
    ],
)
def test_prepared_sets_are_read_exactly_and_in_order(prepared, name, split, samples):
    dataset = data.load(name, split, str(prepared))
    assert_holds(dataset, samples)
    assert dataset.num_classes == 10


def test_a_set_larger_than_one_read_is_read_whole(prepared, monkeypatch):
    monkeypatch.setattr(data, "_CHUNK", 7)
    assert_holds(data.load("mnist", "train", str(prepared)), TRAIN)


def test_a_custom_set_is_read(tmp_path):
    """TFDS has no code for it; its features have other names; it has 3 classes."""
    samples = small_tfds.noise(3, 5, (6, 4, 3), num_classes=3)
    features = {
        "id": tfds.features.Text(),
        "picture": tfds.features.Image(shape=(None, None, 3)),
        "kind": tfds.features.ClassLabel(names=["a", "b", "c"]),
    }
    encoded = [
        {"id": str(i), "picture": small_tfds.png(image), "kind": int(label)}
        for i, (image, label) in enumerate(zip(*samples, strict=True))
    ]
    small_tfds.write(tmp_path, "mine", "1.0.0", features, {"train": [encoded]})
    dataset = data.load("mine", "train", str(tmp_path))
    assert_holds(dataset, samples)
    assert dataset.num_classes == 3


def test_the_default_data_directory_is_tfds_data_dir(prepared):
    """TFDS_DATA_DIR is set before the import of TFDS; warnings are errors."""
    command = subprocesses.command("default_data_dir", strict=True)
    environment = os.environ | {"TFDS_DATA_DIR": str(prepared)}
    assert subprocesses.output(command, environment) == "[6, 6] False\n"


def test_a_data_directory_may_start_with_a_tilde(prepared, monkeypatch, offline):
    monkeypatch.setenv("HOME", str(prepared.parent))
    assert_holds(data.load("mnist", "test", f"~/{prepared.name}"), TEST)


def test_a_data_directory_of_an_unknown_user_is_refused(offline):
    with pytest.raises(ValueError, match=r"data_dir=~nobody-here/x: .* '~nobody-here'"):
        data.load("mnist", "test", "~nobody-here/x")


# Splits of either


KEYS = ("train", "test")
# Both ends reach across the shards of mnist, whose test split has 6 samples.
SLICES = st.tuples(st.sampled_from(KEYS), st.integers(-6, 6), st.integers(-6, 6))


@pytest.fixture(scope="module", params=["digits", "mnist"])
def named(request, prepared):
    """The name of a set and its splits."""
    name = request.param
    return name, {key: data.load(name, key, str(prepared)) for key in KEYS}


@given(slices=st.lists(SLICES, min_size=1, max_size=3))
def test_split_slices_follow_python(prepared, named, slices):
    name, whole = named
    split = "+".join(f"{key}[{start}:{stop}]" for key, start, stop in slices)
    parts = [part(whole[key][:2], start, stop) for key, start, stop in slices]
    expected = small_tfds.Samples(*map(np.concatenate, zip(*parts, strict=True)))
    if len(expected.labels):
        assert_holds(data.load(name, split, str(prepared)), expected)
    else:
        with pytest.raises(ValueError, match="is empty"):
            data.load(name, split, str(prepared))


@pytest.mark.parametrize("name", ["digits", "mnist"])
@pytest.mark.parametrize(
    "split",
    [
        *("validation", "train+validation", "TRAIN", "", None, ["train"]),
        *("train[", "train[a:b]", "train[::2]", "train[:101%]", "all[:5]"),
        *("train[5000:]", "train[:-5000]"),
    ],
)
def test_bad_splits_are_refused(prepared, name, split):
    with pytest.raises(ValueError, match=f"{name}, which has train.*, test") as raised:
        data.load(name, split, str(prepared))
    assert repr(split) in str(raised.value)


@pytest.mark.parametrize("name", ["digits", "mnist"])
@pytest.mark.parametrize(
    "split", ["train[:0]", "train[3:3]", "train[9:8]", "train[5:2]", "train[50%:40%]"]
)
def test_empty_splits_are_refused(prepared, name, split):
    with pytest.raises(ValueError, match="empty") as raised:
        data.load(name, split, str(prepared))
    message = str(raised.value)
    assert repr(split) in message
    assert name in message
    assert re.search("train.*test", message)


# per_class


@given(
    seed=st.integers(0, 2**32 - 1), num_classes=st.integers(1, 5), size=st.integers(1, 40)
)
def test_per_class_takes_the_first_samples_of_each_class(seed, num_classes, size):
    labels = np.random.default_rng(seed).integers(0, num_classes, size, np.int32)
    images = np.arange(size, dtype=np.uint8)[:, None, None, None]
    whole = data.Dataset(images, labels, num_classes)
    least = min(int(np.sum(labels == k)) for k in range(num_classes))
    for per_class in range(1, least + 1):
        kept = data.first_of_each_class(whole, per_class)
        # By definition: fewer than per_class of its class come before it.
        index = [i for i in range(size) if np.sum(labels[:i] == labels[i]) < per_class]
        assert_holds(kept, small_tfds.Samples(images[index], labels[index]))
        assert kept.num_classes == num_classes
    with pytest.raises(ValueError, match=f"per_class is {least + 1} but class"):
        data.first_of_each_class(whole, least + 1)


def test_per_class_gives_every_class_as_many_samples():
    whole = data.load("digits", "train")
    dataset = data.load("digits", "train", per_class=5)
    np.testing.assert_array_equal(np.bincount(dataset.labels), np.full(10, 5))
    places = [
        np.flatnonzero(np.all(whole.images == image, axis=(1, 2, 3)))[0]
        for image in dataset.images
    ]
    assert places == sorted(places)
    for per_class in (None, 0):
        same = data.load("digits", "train", per_class=per_class)
        assert_holds(same, small_tfds.Samples(whole.images, whole.labels))


def test_per_class_refuses_more_samples_than_a_class_has(prepared):
    with pytest.raises(
        ValueError, match=r"per_class is 200 but class \d has 1\d\d samples"
    ):
        data.load("digits", "train", per_class=200)
    counts = np.bincount(TRAIN.labels, minlength=10)
    with pytest.raises(ValueError, match=f"class {counts.argmin()} has {counts.min()}"):
        data.load("mnist", "train", str(prepared), per_class=20)


@pytest.mark.parametrize("per_class", [-1, 1.5, True, "3"])
def test_per_class_must_be_an_integer_of_at_least_0(per_class):
    with pytest.raises(ValueError, match="per_class must be an integer of at least 0"):
        data.load("digits", "train", per_class=per_class)


# Sets that cannot be used


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mnsit", "did you mean mnist or"),
        ("cifar11", "cifar10"),
        ("Digits", "did you mean digits"),
        ("no_such_thing", "digits needs no network"),
    ],
)
def test_names_unknown_to_tfds_are_refused(tmp_path, offline, name, hint):
    with pytest.raises(ValueError, match=f"no data set is called {name!r}: .*{hint}"):
        data.load(name, "train", str(tmp_path))


@pytest.mark.parametrize("name", ["", "a b", "../mnist", "mnist/", "mnist,5", "hub:mnist"])
def test_malformed_names_are_refused(tmp_path, offline, name):
    with pytest.raises(ValueError, match=f"no data set is called {name!r}"):
        data.load(name, "train", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "features"),
    [("imdb_reviews", "text, label"), ("celeb_a", "image, landmarks, attributes")],
)
def test_sets_without_images_or_labels_are_refused(tmp_path, name, features):
    """Before anything is downloaded."""
    with pytest.raises(ValueError, match="not an image classification set") as raised:
        data.load(name, "train", str(tmp_path))
    assert name in str(raised.value)
    assert features in str(raised.value)


def prepare(root, features, **columns):
    samples = [
        dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
    ]
    small_tfds.write(root, "mine", "1.0.0", features, {"train": [samples]})


@pytest.mark.parametrize("labels", [[], ["a", "b"]], ids=["none", "two"])
def test_sets_with_several_labels_are_refused(tmp_path, labels):
    features = {"image": tfds.features.Image(shape=(32, 32, 3))}
    features |= {name: tfds.features.ClassLabel(num_classes=10) for name in labels}
    columns = {name: COLOUR.labels.tolist() for name in labels}
    images = map(small_tfds.png, COLOUR.images)
    prepare(tmp_path, features, image=images, **columns)
    with pytest.raises(ValueError, match=r"expected one image and one label, got .*image"):
        data.load("mine", "train", str(tmp_path))


@pytest.mark.parametrize("per_class", [None, 1])
@pytest.mark.parametrize("unlabelled", [1, 12])
def test_samples_without_label_are_refused(tmp_path, unlabelled, per_class):
    """TFDS marks them with -1."""
    labels = [-1] * unlabelled + COLOUR.labels.tolist()[unlabelled:]
    images = map(small_tfds.png, COLOUR.images)
    features = small_tfds.classification((32, 32, 3))
    prepare(tmp_path, features, image=images, label=labels)
    with pytest.raises(ValueError, match=r"split 'train' of mine.* label.*-1"):
        data.load("mine", "train", str(tmp_path), per_class=per_class)


def test_images_of_several_sizes_are_refused(tmp_path):
    images = [small_tfds.png(image[: 32 - i % 2]) for i, image in enumerate(COLOUR.images)]
    features = small_tfds.classification((None, None, 3))
    prepare(tmp_path, features, image=images, label=COLOUR.labels.tolist())
    with pytest.raises(ValueError, match="mine has images of several sizes"):
        data.load("mine", "train", str(tmp_path))


@pytest.mark.parametrize(
    ("channels", "dtype"), [(4, np.uint8), (1, np.uint16)], ids=["rgba", "uint16"]
)
def test_images_of_other_kinds_are_refused(tmp_path, channels, dtype):
    features = {
        "image": tfds.features.Image(shape=(8, 8, channels), dtype=dtype),
        "label": tfds.features.ClassLabel(num_classes=2),
    }
    images = [small_tfds.png(np.zeros((8, 8, channels), dtype)) for _ in range(2)]
    prepare(tmp_path, features, image=images, label=[0, 1])
    with pytest.raises(ValueError, match=r"mine has images .* 1 or 3 channels of uint8"):
        data.load("mine", "train", str(tmp_path))


# Sets that are not there


def test_an_unprepared_set_without_network_is_refused(prepared, offline):
    start = time.monotonic()
    with pytest.raises(OSError, match="no network") as raised:
        data.load("kmnist", "test", str(prepared))
    assert time.monotonic() - start < data._PROBE_SECONDS
    message = str(raised.value)
    assert "kmnist" in message
    assert f"not prepared in {prepared} (there: cifar10" in message
    for word in ("mnist", "choose a prepared set", "--data_dir", "TFDS_DATA_DIR", "digits"):
        assert word in message


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_an_empty_data_directory_is_refused(tmp_path, offline, kind):
    root = tmp_path if kind == "empty" else tmp_path / "missing"
    with pytest.raises(OSError, match=f"not prepared in {root} .nothing is there."):
        data.load("emnist/letters", "train", str(root))


def test_another_prepared_version_is_named(prepared, tmp_path, offline):
    """The message names both versions."""
    shutil.copytree(prepared / "mnist" / "3.0.1", tmp_path / "mnist" / "3.0.0")
    with pytest.raises(OSError, match=r"mnist/3.0.1 is not prepared .*mnist/3.0.0"):
        data.load("mnist", "train", str(tmp_path))


def test_a_downloads_folder_is_not_taken_for_a_set(tmp_path, offline):
    """It may hold very many folders."""
    deep = tmp_path / "downloads" / "extracted" / "archive" / "folder"
    deep.mkdir(parents=True)
    (deep / INFO).touch()
    with pytest.raises(OSError, match="nothing is there"):
        data.load("mnist", "train", str(tmp_path))


@pytest.fixture
def tensorflow(monkeypatch):
    """Pretend that there is a network and that TensorFlow is installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(data, "_has_network", lambda: True)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: True if name == "tensorflow" else find(name, *rest),
    )


def test_preparing_without_tensorflow_is_refused(prepared, monkeypatch):
    monkeypatch.setattr(data, "_has_network", lambda: True)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "tensorflow" else find(name, *rest),
    )
    with pytest.raises(
        OSError, match=r"needs TensorFlow .*pip install tensorflow"
    ) as raised:
        data.load("kmnist", "test", str(prepared))
    assert str(prepared) in str(raised.value)
    assert not (prepared / "kmnist").exists()


def test_a_set_is_prepared_on_demand_as_array_record(tmp_path, monkeypatch, tensorflow):
    def download(builder, *, file_format):
        assert file_format == "array_record"
        builder.info.set_file_format(file_format, override=True)
        small_tfds.write_samples(tmp_path, "mnist", "3.0.1", {"test": [TEST]})
        builder.info.read_from_directory(builder.data_dir)

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", download)
    assert_holds(data.load("mnist", "test", str(tmp_path)), TEST)


@pytest.mark.parametrize(
    "error", [AssertionError("Manual download\nis required"), KeyError]
)
def test_a_failed_preparation_names_the_set_and_the_cause(
    tmp_path, monkeypatch, tensorflow, error
):
    def download(builder, *, file_format):
        raise error

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", download)
    with pytest.raises(OSError, match=r"imagenet2012.*(Manual download|KeyError)"):
        data.load("imagenet2012", "train", str(tmp_path))


# The network


@pytest.fixture
def hang(monkeypatch):
    """Let each request hang until the test is over."""
    over = threading.Event()
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: over.wait(30))
    yield
    over.set()


def test_a_hanging_network_probe_times_out(monkeypatch, hang):
    monkeypatch.setattr(data, "_PROBE_SECONDS", 0.1)
    start = time.monotonic()
    assert not data._has_network()
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("error", "answered"),
    [
        (None, True),
        (urllib.error.HTTPError("url", 403, "Forbidden", {}, io.BytesIO()), True),
        (urllib.error.URLError("no such host"), False),
        (TimeoutError(), False),
        (BadStatusLine("garbage"), False),  # neither of these two is an OSError
        (ValueError("unknown url type"), False),
    ],
    ids=repr,
)
def test_any_http_answer_counts_as_a_network(monkeypatch, error, answered):
    def urlopen(url, timeout):
        assert url.startswith("https://")
        assert 0 < timeout <= data._PROBE_SECONDS
        if error:
            raise error

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert data._has_network() is answered


@pytest.fixture
def server(monkeypatch):
    """The address of a web server, and the list of paths requested from it."""
    requested = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requested.append(self.path)
            self.send_response(404 if "missing" in self.path else 200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_):
            pass

    for variable in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    urllib.request.install_opener(None)  # the old one has read them already
    with HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", requested
        httpd.shutdown()
        thread.join()
    urllib.request.install_opener(None)


@pytest.mark.parametrize("page", ["there", "missing"])
def test_an_answering_server_counts_as_a_network(server, monkeypatch, page):
    address, requested = server
    monkeypatch.setattr(data, "_PROBE", f"{address}/{page}")
    assert data._has_network()
    assert requested == [f"/{page}"]


def test_a_refusing_server_does_not_count_as_a_network(server, monkeypatch):
    monkeypatch.setattr(data, "_PROBE", "http://127.0.0.1:1/")
    assert not data._has_network()


def test_the_network_is_looked_for_through_a_proxy(server, monkeypatch):
    address, requested = server
    monkeypatch.setenv("http_proxy", address)
    monkeypatch.setattr(data, "_PROBE", "http://storage.invalid/tfds")
    assert data._has_network()
    assert requested == ["http://storage.invalid/tfds"]


# Damage


def cut(length):
    return lambda path: path.write_bytes(path.read_bytes()[:length])


def flip(start):
    """Invert 8 bytes."""

    def change(path):
        content = bytearray(path.read_bytes())
        content[start : start + 8] = bytes(255 - b for b in content[start : start + 8])
        path.write_bytes(content)

    return change


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(cut(0), id="empty"),
        pytest.param(cut(100), id="cut in the first block"),
        pytest.param(cut(2**16), id="cut between blocks"),
        pytest.param(cut(2**16 + 999), id="cut in the second block"),
        pytest.param(cut(-1), id="cut at the end"),
        pytest.param(flip(64), id="header of a chunk"),
        pytest.param(flip(500), id="record"),
        pytest.param(flip(2**16), id="last block"),
        pytest.param(lambda path: path.write_text("nothing of this kind"), id="text"),
        pytest.param(
            lambda path: shutil.copy(
                path.with_name(path.name.replace("00001-", "00000-")), path
            ),
            id="fewer records than in the description",
        ),
        pytest.param(Path.unlink, id="missing"),
    ],
)
def test_damaged_records_are_named(own, damage):
    """The error names the damaged shard alone; the other is still read."""
    root, folder = own
    damage(folder / SHARD)
    with pytest.raises(OSError, match="damaged or missing records") as raised:
        data.load("mnist", "train", str(root))
    assert str(folder / SHARD) in str(raised.value)
    assert "00000-of-00002" not in str(raised.value)
    assert "test" not in str(raised.value).replace(str(root), "")
    first = data.load("mnist", f"train[:{FIRST}]", str(root))
    assert_holds(first, part(TRAIN, 0, FIRST))
    assert_holds(data.load("mnist", "test", str(root)), TEST)


def test_damage_in_both_shards_is_named(own):
    root, folder = own
    paths = sorted(folder.glob("mnist-train*"))
    paths[0].unlink()
    cut(100)(paths[1])
    with pytest.raises(OSError, match="damaged or missing records") as raised:
        data.load("mnist", "train", str(root))
    for path in paths:
        assert str(path) in str(raised.value)


def test_records_that_hold_no_image_are_named(tmp_path):
    features = small_tfds.classification((8, 8, 1))
    prepare(tmp_path, features, image=[io.BytesIO(b"no image")], label=[0])
    with pytest.raises(OSError, match=r"damaged or missing records in .*1.0.0: "):
        data.load("mine", "train", str(tmp_path))


@pytest.mark.parametrize("start", [b"RIFF\x10\0\0\0WEBP", b"II*\0", b"MM\0*"])
def test_images_of_other_formats_are_refused_by_the_formats_that_are_read(tmp_path, start):
    features = small_tfds.classification((8, 8, 1))
    prepare(tmp_path, features, image=[io.BytesIO(start + bytes(20))], label=[0])
    with pytest.raises(ValueError, match="is not PNG, JPEG, BMP or GIF: convert"):
        data.load("mine", "train", str(tmp_path))


def describe(**changes):
    """Change the description of a set; None removes an entry."""

    def change(path):
        entries = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in entries.items() if v is not None}))

    return change


@pytest.mark.parametrize("name", ["mnist", "mine"], ids=["of TFDS", "of one's own"])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(cut(0), id="empty"),
        pytest.param(cut(100), id="cut"),
        pytest.param(lambda path: path.write_text("{}"), id="nothing in it"),
        pytest.param(lambda path: path.write_bytes(b"\xff\xfe\0"), id="binary"),
        pytest.param(describe(fileFormat="zip"), id="unknown format"),
        pytest.param(describe(splits=None), id="no splits"),
        pytest.param(
            lambda path: path.write_text(path.read_text().replace("{SPLIT}", "{RPLIT}")),
            id="names of files",
        ),
    ],
)
def test_a_damaged_description_is_named(tmp_path, offline, name, damage):
    splits = {"train": [TRAIN], "test": [TEST]}
    folder = small_tfds.write_samples(tmp_path, name, "3.0.1", splits)
    damage(folder / INFO)
    with pytest.raises(OSError, match=str(tmp_path)) as raised:
        data.load(name, "train", str(tmp_path))
    assert name in str(raised.value)


@pytest.mark.parametrize("by_environment", [False, True])
def test_a_custom_set_without_features_is_refused(
    tmp_path, offline, monkeypatch, by_environment
):
    folder = small_tfds.write_samples(tmp_path, "mine", "1.0.0", {"train": [TRAIN]})
    (folder / "features.json").unlink()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    lacks = f"'mine': {tmp_path / 'mine'} lacks a description"
    with pytest.raises(ValueError, match=lacks):
        data.load("mine", "train", None if by_environment else str(tmp_path))


@pytest.mark.parametrize("kind", ["tfrecord", "riegeli"])
def test_a_format_that_needs_tensorflow_is_refused(own, kind):
    root, folder = own
    describe(fileFormat=kind)(folder / INFO)
    with pytest.raises(OSError, match=f"holds mnist as {kind}, which needs TensorFlow"):
        data.load("mnist", "train", str(root))


def test_a_folder_without_description_is_not_overwritten(own, monkeypatch, tensorflow):
    """TFDS itself would take the folder for a prepared set."""
    root, folder = own
    (folder / INFO).unlink()
    with pytest.raises(OSError, match=f"{folder} is incomplete"):
        data.load("mnist", "train", str(root))
    assert (folder / SHARD).exists()


# Data of others


EVIL = "evil_features.Evil"


def features_of(content):
    """A description of one more feature, in the place where TFDS looks for features."""
    return {"pythonClassName": CLASS.format("features_dict.FeaturesDict"), **content}


CLASS = "tensorflow_datasets.core.features.{}"
AS_TEXT = json.dumps({"type": EVIL, "content": {}})
NAMED = {
    "itself": {"pythonClassName": EVIL, "jsonFeature": {"json": "{}"}},
    "other spelling": {"python_class_name": EVIL, "jsonFeature": {"json": "{}"}},
    "older version": {"type": EVIL, "content": {}},
    "nested": features_of(
        {"featuresDict": {"features": {"x": {"pythonClassName": EVIL, "text": {}}}}}
    ),
    "in text": {
        "pythonClassName": CLASS.format("sequence_feature.Sequence"),
        "jsonFeature": {"json": json.dumps({"feature": {"type": EVIL}, "length": 1})},
    },
    "in text in text": {
        "pythonClassName": CLASS.format("sequence_feature.Sequence"),
        "jsonFeature": {"json": json.dumps({"feature": {"jsonFeature": AS_TEXT}})},
    },
    "in a proto as text": {
        "type": CLASS.format("features_dict.FeaturesDict"),
        "proto_cls": "tensorflow_datasets.FeaturesDict",
        "content": json.dumps({"features": {"x": {"pythonClassName": EVIL}}}),
    },
    "no feature of TFDS": {"type": "tensorflow_datasets.testing.test_utils.Dummy"},
    "looks like TFDS": {"type": "tensorflow_datasets.core.features.x.Image"},
}


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module in the current folder that leaves a trace when it is imported."""
    (tmp_path / "evil_features.py").write_text("open('trace', 'w').close()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "trace"


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("where", ["features.json", INFO, "another version", "Mine"])
def test_a_description_that_names_code_is_refused_and_not_run(tmp_path, evil, kind, where):
    folder = small_tfds.write_samples(tmp_path, "mine", "1.0.0", {"train": [TEST]})
    if where == INFO:
        describe(features=NAMED[kind])(folder / INFO)
    else:
        if where == "another version":
            folder = shutil.copytree(folder, tmp_path / "mine" / "0.9.0")
        (folder / "features.json").write_text(json.dumps(NAMED[kind]))
    name = "Mine" if where == "Mine" else "mine"
    with pytest.raises(OSError, match=r"names the class '.*': expected a feature of TFDS"):
        data.load(name, "train", str(tmp_path))
    assert not evil.exists()


def test_tfds_itself_runs_the_class_that_a_description_names(tmp_path, evil):
    """So the check above is needed, and the module of this test can be imported."""
    folder = small_tfds.write_samples(tmp_path, "mine", "1.0.0", {"train": [TEST]})
    (folder / "features.json").write_text(json.dumps(NAMED["itself"]))
    with pytest.raises(ValueError, match="evil_features"):
        tfds.builder("mine", data_dir=str(tmp_path))
    assert evil.exists()


def test_every_feature_of_tfds_may_be_named(tmp_path):
    """Features beside image and label are not decoded."""
    features = small_tfds.classification((8, 8, 1)) | {
        "thumbnail": tfds.features.Image(shape=(None, None, 1)),
        "type": tfds.features.Text(),
        "boxes": tfds.features.Sequence(tfds.features.BBoxFeature()),
        "more": {"size": tfds.features.Scalar(np.int64)},
    }
    image = small_tfds.noise(0, 1, (8, 8, 1)).images[0]
    sample = {"image": small_tfds.png(image), "label": 3, "type": "{", "boxes": []}
    sample |= {"thumbnail": io.BytesIO(header(60000, 60000)), "more": {"size": 1}}
    small_tfds.write(tmp_path, "mine", "1.0.0", features, {"train": [[sample]]})
    loaded = data.load("mine", "train", str(tmp_path))
    np.testing.assert_array_equal(loaded.images[0], image)


def test_a_builder_script_in_the_folder_is_not_run(tmp_path, evil):
    small_tfds.write_samples(tmp_path, "mine", "1.0.0", {"train": [TEST]})
    for place in (tmp_path / "mine", tmp_path / "mine" / "1.0.0"):
        for name in ("mine", "__init__", "mine_dataset_builder"):
            shutil.copy(tmp_path / "evil_features.py", place / f"{name}.py")
    assert_holds(data.load("mine", "train", str(tmp_path)), TEST)
    assert not evil.exists()


def test_a_data_directory_that_python_takes_for_tfds_is_refused(tmp_path):
    """Its usual name, ~/tensorflow_datasets, is that of the package."""
    package = tmp_path / "tensorflow_datasets"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('it ran')")
    script = (
        f"from ncjax.networks import data; data.load('mine', 'train', {str(package)!r})"
    )
    result = subprocesses.run([sys.executable, "-c", script], cwd=tmp_path)
    assert "would be imported as the package tensorflow_datasets" in result.stderr
    assert "it ran" not in result.stderr


@pytest.mark.parametrize(
    "name", ["features.json", INFO, "mine-train.array_record-0", SHARD]
)
def test_a_named_pipe_in_a_set_is_refused(tmp_path, name):
    folder = small_tfds.write_samples(tmp_path, "mnist", "3.0.1", {"train": [TRAIN] * 2})
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(OSError, match=f"{name} is a named pipe, a socket or a device"):
        data.load("mnist", "train", str(tmp_path))


def test_a_description_that_names_a_device_as_its_shards_is_refused(own):
    root, folder = own
    path = folder / INFO
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    path.write_text(path.read_text().replace(template, "/dev/zero"))
    with pytest.raises(OSError, match="/dev/zero is a named pipe, a socket or a device"):
        data.load("mnist", "train", str(root))


def test_a_description_that_is_nested_too_deeply_is_refused(own):
    root, folder = own
    (folder / "features.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(OSError, match=r"features\.json is damaged: it is nested too deep"):
        data.load("mnist", "train", str(root))


@pytest.mark.parametrize("label", [10, 2**31, 2**62, -2])
def test_labels_outside_the_classes_are_refused(tmp_path, monkeypatch, label):
    """TFDS checks labels when it writes them, not when it reads them."""
    features = small_tfds.classification((32, 32, 3))
    monkeypatch.setattr(tfds.features.ClassLabel, "encode_example", lambda _, label: label)
    labels = COLOUR.labels.tolist()
    labels[7] = label
    images = map(small_tfds.png, COLOUR.images)
    prepare(tmp_path, features, image=images, label=labels)
    expected = f"record 7 of split 'train' of mine has label {label}: expected 0 to 9"
    with pytest.raises(ValueError, match=expected):
        data.load("mine", "train[1:3]+train[5:]", str(tmp_path))


def header(width, height, kind="PNG"):
    """Start of an image of this size, without its pixels."""
    if kind == "PNG":
        size = struct.pack(">II", width, height) + bytes([8, 0, 0, 0, 0])
        chunk = b"IHDR" + size
        checksum = struct.pack(">I", zlib.crc32(chunk))
        return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + checksum
    file = io.BytesIO()
    Image.new("L", (9, 8)).save(file, kind)
    if kind == "JPEG":
        nine, size = struct.pack(">HH", 8, 9), struct.pack(">HH", height, width)
    else:
        nine, size = struct.pack("<ii", 9, 8), struct.pack("<ii", width, height)
    return file.getvalue().replace(nine, size, 1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
@pytest.mark.parametrize(
    ("declared", "width", "height", "message"),
    [
        ((8, 8), 12000, 12000, "12000x12000 pixels: its description declares 8x8"),
        ((8, 8), 8, 9, "9x8 pixels: its description declares 8x8"),
        ((8, None), 8, 9, "9x8 pixels: its description declares 8xany"),
        ((None, None), 8193, 8193, "8193x8193 pixels: expected at most 67,108,864 pix"),
    ],
)
def test_an_image_larger_than_declared_is_refused_before_it_is_decoded(
    tmp_path, monkeypatch, kind, declared, width, height, message
):
    def decode(self, example):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(tfds.features.Image, "decode_example_np", decode)
    features = small_tfds.classification((*declared, 1))
    image = io.BytesIO(header(width, height, kind))
    prepare(tmp_path, features, image=[image], label=[0])
    expected = f"record 0 of split 'train' of mine holds an image of {message}"
    with pytest.raises(ValueError, match=expected):
        data.load("mine", "train", str(tmp_path))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
def test_an_image_of_gigabytes_is_refused(tmp_path, kind):
    features = small_tfds.classification((None, None, 1))
    image = io.BytesIO(header(60000, 60000, kind))
    prepare(tmp_path, features, image=[image], label=[0])
    expected = "record 0 of split 'train' of mine holds .*(60000x60000|3600000000) pixels"
    with pytest.raises(ValueError, match=expected):
        data.load("mine", "train", str(tmp_path))


def test_images_of_other_channels_than_declared_are_refused(tmp_path):
    features = small_tfds.classification((32, 32, 1))
    prepare(tmp_path, features, image=[small_tfds.png(COLOUR.images[0])], label=[0])
    expected = "holds an image of shape 32x32x3: expected 32x32x1"
    with pytest.raises(ValueError, match=expected):
        data.load("mine", "train", str(tmp_path))


def test_more_images_than_the_memory_holds_are_refused(own, monkeypatch):
    root, _ = own
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    with pytest.raises(
        ValueError, match=r"24 images of 28x28 pixels need .* take a smaller"
    ):
        data.load("mnist", "train", str(root))


@pytest.fixture
def bomb(tmp_path):
    """A set whose second shard, of 128 kB, holds a record of 100 MB."""
    folder = small_tfds.write_samples(tmp_path, "mine", "1.0.0", {"train": [TEST, TEST]})
    path = sorted(folder.glob("mine-train*"))[1]
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for size in (10**8, *[0] * (len(TEST.labels) - 1)):
        writer.write(bytes(size))
    writer.close()
    return path


def test_a_record_that_decompresses_to_gigabytes_is_refused(bomb, monkeypatch):
    """The limit is lowered from 1 GB to 50 MB for this test."""
    monkeypatch.setattr(chunks, "_MOST_BYTES", 5 * 10**7)
    root = str(bomb.parents[2])
    assert bomb.stat().st_size < 1e6
    with pytest.raises(OSError, match=f"{bomb}: one has 100,000,0.. bytes, expected at"):
        data.load("mine", "train", root)
    assert_holds(data.load("mine", f"train[:{len(TEST.labels)}]", root), TEST)


@given(
    sizes=st.lists(st.sampled_from([0, 1, 30, 500, 65480, 70000, 200_000]), max_size=30),
    seed=st.integers(0, 2**32 - 1),
    option=st.sampled_from(
        [
            *("group_size:1", "group_size:7", "group_size:1,uncompressed"),
            *("group_size:3,brotli:6", "group_size:5,snappy", "group_size:4,transpose"),
            "group_size:1,pad_to_block_boundary:true",
        ]
    ),
)
def test_the_sizes_of_chunks_are_those_that_were_written(
    tmp_path_factory, sizes, seed, option
):
    path = tmp_path_factory.mktemp("chunks") / "x.array_record"
    writer = ArrayRecordWriter(str(path), option)
    rng = np.random.default_rng(seed)
    for size in sizes:
        writer.write(rng.bytes(size // 2) + bytes(size - size // 2))
    writer.close()
    found = list(chunks._chunks(path))
    # The end of the file holds the places of the chunks, in a few bytes each.
    overhead = sum(chunk.num_bytes for chunk in found) - sum(sizes)
    assert 0 <= overhead < 200 + 20 * len(sizes)
    if option.startswith("group_size:1,") or option == "group_size:1":
        assert max(sizes, default=0) <= chunks.largest_record(path)
        assert chunks.largest_record(path) <= max([*sizes, 0]) + 200


def test_an_image_of_a_format_that_starts_a_program_is_refused(tmp_path):
    """Pillow hands PostScript to Ghostscript."""
    image = io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    features = small_tfds.classification((8, 8, 1))
    prepare(tmp_path, features, image=[image], label=[0])
    with pytest.raises(OSError, match="cannot identify image file"):
        data.load("mine", "train", str(tmp_path))


# Operations on images


@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 9),
    shape=st.tuples(*[st.integers(1, 9)] * 2, st.sampled_from([1, 3])),
)
def test_pad_to_centres_images_in_zeros(seed, size, shape):
    images = np.random.default_rng(seed).integers(1, 256, (2, *shape), np.uint8)
    if size < max(shape[:2]):
        message = f"image_size is {size} but the images are {shape[0]}x{shape[1]}"
        with pytest.raises(ValueError, match=message):
            data.pad_to(images, size)
        return
    padded = data.pad_to(images, size)
    assert padded.shape == (2, size, size, shape[2])
    assert padded.dtype == np.uint8
    rows, columns = (
        np.flatnonzero(padded.any(axis=axes)) for axes in ((0, 2, 3), (0, 1, 3))
    )
    # The image is positive everywhere: the nonzero part is the image, in the middle.
    np.testing.assert_array_equal(padded[:, rows][:, :, columns], images)
    for inside in (rows, columns):
        assert size - 1 - inside[-1] - inside[0] in (0, 1)
    assert padded.sum(dtype=int) == images.sum(dtype=int)


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(*[st.integers(1, 6)] * 3, st.sampled_from([1, 3])),
    low=st.integers(0, 255),
)
def test_channel_statistics_equal_numpy(seed, shape, low):
    images = np.random.default_rng(seed).integers(low, 256, shape, np.uint8)
    mean, deviation = data.channel_statistics(images)
    assert mean.shape == deviation.shape == (shape[-1],)
    assert mean.dtype == deviation.dtype == np.float32
    scaled = images.astype(np.float64) / 255
    expected = scaled.std(axis=(0, 1, 2))
    constant = np.ptp(images, axis=(0, 1, 2)) == 0
    np.testing.assert_allclose(mean, scaled.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(deviation, np.where(constant, 1, expected), rtol=1e-6)


@pytest.mark.parametrize("value", [0, 1, 127, 255])
def test_a_constant_channel_has_deviation_one(value):
    images = np.random.default_rng(0).integers(0, 256, (50, 20, 20, 3), np.uint8)
    images[..., 1] = value
    mean, deviation = data.channel_statistics(images)
    np.testing.assert_allclose(mean[1], value / 255, rtol=1e-6)
    assert deviation[1] == 1
    normalised = data.normalise(jnp.asarray(images), mean, deviation)
    np.testing.assert_allclose(normalised[..., 1], 0, atol=1e-7)


def test_normalise_centres_and_scales_each_channel():
    images = data.load("digits", "test").images
    colour = np.concatenate([images, 255 - images, images // 2], axis=-1)
    mean, deviation = data.channel_statistics(colour)
    got = data.normalise(jnp.asarray(colour), jnp.asarray(mean), jnp.asarray(deviation))
    assert got.dtype == jnp.float32  # although x64 is on
    expected = (colour / 255 - mean.astype(float)) / deviation.astype(float)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(got.std(axis=(0, 1, 2)), 1, rtol=1e-5)
    traced = jax.jit(data.normalise)(colour, mean, deviation)
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, got, rtol=1e-6, atol=1e-6)


def shifted(image, down, right):
    """Shift an image (height, width, C) and fill with zeros."""
    height, width, _ = image.shape
    moved = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                moved[row, column] = image[row - down, column - right]
    return moved


def variants(image):
    """All 2 x 9 x 9 images that `augment` may make of one."""
    moved = [shifted(image, i, j) for i in range(-4, 5) for j in range(-4, 5)]
    return np.stack(moved + [m[:, ::-1] for m in moved])


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, 1, 1), (3, 8, 3), (9, 5, 1)]),
    dtype=st.sampled_from([np.uint8, np.float32]),
)
def test_augment_shifts_and_mirrors(seed, shape, dtype):
    images = np.random.default_rng(seed).integers(1, 256, (4, *shape)).astype(dtype)
    augmented = np.asarray(data.augment(jax.random.key(seed), jnp.asarray(images)))
    assert augmented.shape == images.shape
    assert augmented.dtype == dtype
    for before, after in zip(images, augmented, strict=True):
        assert np.any(np.all(variants(before) == after, axis=(1, 2, 3)))


def test_augment_makes_every_variant_as_often(key):
    """All pixels differ and the image exceeds the shifts: no two variants are alike."""
    image = np.random.default_rng(0).permutation(np.arange(1, 121, dtype=np.uint8))
    image = image.reshape(12, 10, 1)
    each = 50
    batch = jnp.tile(jnp.asarray(image), (162 * each, 1, 1, 1))
    augmented = np.asarray(jax.jit(data.augment)(key, batch))
    number = {variant.tobytes(): i for i, variant in enumerate(variants(image))}
    assert len(number) == 162
    counts = np.bincount([number[a.tobytes()] for a in augmented], minlength=162)
    # Pearson's statistic has mean 161 and deviation 18.
    assert 100 < np.sum((counts - each) ** 2 / each) < 250


def test_augment_depends_on_its_key_only(key):
    images = jnp.asarray(COLOUR.images)
    first = data.augment(key, images)
    np.testing.assert_array_equal(first, data.augment(key, images))
    np.testing.assert_array_equal(first, jax.jit(data.augment)(key, images))
    other = data.augment(jax.random.key(1), images)
    assert not np.array_equal(first, other)


# Real images


PUBLISHED = [  # split "test": samples of each class, mean and deviation of each channel
    (
        "mnist",
        [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
        [0.1325],
        [0.3105],
    ),
    ("kmnist", [1000] * 10, [0.1846], [0.3416]),
    ("cifar10", [1000] * 10, [0.4942, 0.4851, 0.4504], [0.2467, 0.2429, 0.2616]),
]


@pytest.mark.parametrize(
    ("name", "counts", "mean", "deviation"), PUBLISHED, ids=[row[0] for row in PUBLISHED]
)
def test_real_sets_have_their_published_counts_and_statistics(
    offline, name, counts, mean, deviation
):
    """Skipped unless they are prepared in the data directory of TFDS."""
    try:
        dataset = data.load(name, "test")
    except OSError as error:
        if not re.search("is not prepared|needs TensorFlow", str(error)):
            raise
        pytest.skip(str(error))
    size = 32 if len(mean) == 3 else 28
    assert dataset.images.shape == (10000, size, size, len(mean))
    np.testing.assert_array_equal(np.bincount(dataset.labels), counts)
    statistics = data.channel_statistics(dataset.images)
    # The tolerance allows for images compressed again as JPEG.
    np.testing.assert_allclose(statistics, [mean, deviation], atol=3e-3)
    middle = data.load(name, "test[4000:4010]")
    assert_holds(middle, part(small_tfds.Samples(*dataset[:2]), 4000, 4010))
    balanced = data.load(name, "test[:500]", per_class=10)
    np.testing.assert_array_equal(np.bincount(balanced.labels), [10] * 10)
