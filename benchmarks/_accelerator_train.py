"""Train ResNet18 on CIFAR-10 as long as the time of the section allows, and measure it."""

import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _accelerator_images
from benchmarks._accelerator_checks import Check, Finding, Setting, Skipped
from benchmarks._accelerator_step import TINY_OPTIONS
from benchmarks._accelerator_timing import peak_memory
from experiments import _record
from ncjax.networks import checkpoint, data, models, train

BATCH, LEARNING_RATE = 128, 0.05
# Measured epochs, about even in log log epoch, and the last one.
MEASURED = (
    *(1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 18, 22, 26, 31, 37, 44, 52, 62, 74, 88, 105, 125),
    *(150, 175, 200, 250, 300),
)
TINY_EPOCHS = 3
OUTPUTS = (
    _record.METRICS_FILE,
    *("collapse.png", "collapse.pdf", "training.png", "training.pdf"),
)
_RESERVE = 12.0  # seconds for the figures and the checkpoint


class Trained(NamedTuple):
    """A training run."""

    state: train.TrainState
    rows: list[dict[str, Any]]  # of metrics.csv
    seconds: list[float]  # of each epoch; the first one compiles
    images: int  # of an epoch
    dtype: str
    source: str


def checks(setting: Setting) -> list[Check]:
    """Return the checks of one training run; the first of them trains."""
    runs: list[Trained] = []

    def trained() -> Trained:
        if not runs:
            raise Skipped("no network was trained")
        return runs[0]

    def training() -> Finding:
        runs.append(_train(setting))
        return _speed(runs[0])

    return [
        Check("epochs of ResNet18", training),
        Check("training accuracy rises", lambda: _learning(trained())),
        Check("collapse: NC1 falls", lambda: _collapse(trained(), setting)),
        Check("a checkpoint comes back bit for bit", lambda: _checkpoint(trained())),
    ]


class _Run:
    """Network, data and compiled functions of the run."""

    def __init__(self, sets: dict[str, data.Dataset], tiny: bool):
        first = sets["train"]
        self.batch = 16 if tiny else BATCH
        self.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        model = models.build(
            "resnet18",
            first.num_classes,
            dtype=jnp.dtype(self.dtype),
            **(TINY_OPTIONS if tiny else {}),
        )
        optimiser = train.sgd(LEARNING_RATE)
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), (train.AXIS,))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        statistics = data.channel_statistics(first.images)
        self.sets = {
            split: train.on_device(dataset, *statistics, mesh)
            for split, dataset in sets.items()
        }
        start = train.init_state(
            model, optimiser, first.images.shape[1:], jax.random.key(0)
        )
        self.state = jax.device_put(start, everywhere)
        self._epoch = jax.jit(
            train.make_epoch(model, optimiser, batch_size=self.batch, mesh=mesh),
            donate_argnums=0,
            out_shardings=everywhere,
        )
        self._forward = jax.jit(train.make_forward(model, mesh), out_shardings=everywhere)

    def epoch(self, number: int) -> float:
        """Train an epoch and return its seconds."""
        key = jax.random.fold_in(jax.random.key(1), number)
        started = time.perf_counter()
        self.state, log = self._epoch(self.state, self.sets["train"], key)
        jax.block_until_ready(log)
        return time.perf_counter() - started

    def measure(self, number: int) -> list[dict[str, Any]]:
        """Return a row of metrics for each split."""
        rows, centres = [], None
        for split, dataset in self.sets.items():
            features = train.extract_features(self._forward, self.state, dataset)
            known = {"epoch": number, "seed": 0, "split": split}
            measured = train.measure(features, dataset.labels, self.state.params, centres)
            rows.append(known | measured)
            if centres is None:
                centres = train.class_means(features, dataset.labels, self.state.params)
        return rows


def _train(setting: Setting) -> Trained:
    """Train until the time is over; measure on the way and at the end."""
    if not _accelerator_images.exists(setting.data):
        raise Skipped(f"there is no {setting.data}")
    sets, source = _accelerator_images.read(setting.data, setting.tiny)
    run = _Run(sets, setting.tiny)
    rows: list[dict[str, Any]] = []
    seconds: list[float] = []
    cost, is_last = 0.0, False
    last = TINY_EPOCHS if setting.tiny else MEASURED[-1]
    while not is_last:
        number = len(seconds) + 1
        seconds.append(run.epoch(number))
        needed = _RESERVE + cost + 2 * seconds[-1]
        is_last = number == last or setting.seconds_left() < needed
        if number in MEASURED or is_last:
            started = time.perf_counter()
            rows += run.measure(number)
            cost = time.perf_counter() - started
    images = len(sets["train"].labels) // run.batch * run.batch
    return Trained(run.state, rows, seconds, images, run.dtype, source)


def _speed(run: Trained) -> Finding:
    seconds = float(np.median(run.seconds[1:] or run.seconds))
    details = {
        "images": run.source,
        "epochs": len(run.seconds),
        "images_per_s": run.images / seconds,
        "dtype": run.dtype,
        "compile_s": max(run.seconds[0] - seconds, 0.0),
        "peak_GiB": peak_memory(),
    }
    is_finite = all(np.isfinite(row["loss"]) for row in run.rows)
    return Finding(is_finite, seconds, "s/epoch", details)


def _learning(run: Trained) -> Finding:
    of_train, of_test = (_record.columns(run.rows, split) for split in ("train", "test"))
    accuracy = of_train["accuracy"][0]
    zero = _record.zero_error_epoch(of_train)
    details = {
        "first": accuracy[0],
        "test": of_test["accuracy"][0, -1],
        "zero_error_from_epoch": "never" if zero is None else zero,
    }
    return Finding(accuracy[-1] >= accuracy[0], accuracy[-1], "accuracy", details)


def _collapse(run: Trained, setting: Setting) -> Finding:
    """Write metrics.csv and the figures, and compare the first epoch with the last."""
    folder = Path(setting.folder)
    _record.write_rows(folder, run.rows)
    _record.draw(folder, run.rows)
    first, last = (
        next(row for row in rows if row["split"] == "train")
        for rows in (run.rows, run.rows[-2:])
    )
    details = {
        "first": first["within_class_variation"],
        "NC2": last["mean_cosine_deviation"],
        "NC3": last["centred_self_duality"],
        "NC4": last["ncc_mismatch"],
    }
    value = last["within_class_variation"]
    # Three epochs of a dry run show no collapse.
    falls = value < first["within_class_variation"] or setting.tiny
    return Finding(falls and bool(np.isfinite(value)), value, "NC1", details)


def _checkpoint(run: Trained) -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        saved = checkpoint.Checkpoints(Path(folder) / "checkpoints")
        started = time.perf_counter()
        saved.save(1, run.state)
        written = time.perf_counter()
        restored, _ = saved.restore(run.state)
        read = time.perf_counter()
        saved.close()
    pairs = zip(jax.tree.leaves(run.state), jax.tree.leaves(restored), strict=True)
    same = all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
    return Finding(same, written - started, "s to write", {"read_s": read - written})
