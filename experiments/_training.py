"""Train a network far past zero error, and measure its collapse on the way.

The experiments that train share this module: flags, data, the loop with its progress,
checkpoints and interruption, the run folder.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ncjax
from experiments import _clock, _record, _stored
from experiments._runs import cli, files, folders, memory, processes, reading
from experiments._runs.errors import BadUse, checks
from experiments._runs.events import Events
from experiments._runs.interruption import Interruption
from experiments._runs.progress import tqdm
from ncjax import sizes
from ncjax.checks import count_not_finite
from ncjax.metrics.peeling import LastLayer
from ncjax.networks import checkpoint, data, models, train

CHECKPOINTS = "checkpoints"
_TENSORBOARD = "tensorboard"
_LAST_MEASURED = "last measured epoch"  # in the notes of a checkpoint
OUTPUTS = (
    *(_record.METRICS_FILE, CHECKPOINTS, _TENSORBOARD, "collapse.csv", "collapse.md"),
    *("collapse.png", "collapse.pdf", "training.png", "training.pdf"),
)
_PACKAGES = ("flax", "optax", "orbax-checkpoint", "tensorflow-datasets")
CLOCKS = ("epoch", "loss")
DTYPES = ("auto", "float32", "bfloat16")
# Seconds between two drawings of the figures, at least.
_FIGURE_SECONDS = 20.0
_POLL_SECONDS = 0.01


class _Drops(NamedTuple):
    """Drops of the learning rate at the ends of equal parts of the training."""

    parts: int
    factor: float
    names: str  # of the parts


# step5 is the schedule of Zhu et al. (NeurIPS 2021): 200 epochs, a drop after every 40.
_SCHEDULES = {
    "constant": _Drops(1, 1.0, ""),
    "step": _Drops(3, 0.1, "thirds"),
    "step5": _Drops(5, 0.2, "fifths"),
}


@dataclasses.dataclass(frozen=True)
class Config(cli.SeveralProcesses):
    """Flags that all training experiments share."""

    dataset: str = cli.flag("digits", "digits (no download), or a set of TFDS", cli.DATA)
    train_split: str = cli.flag(
        "train", "such as 'train[:20%]', as TFDS writes splits", cli.DATA
    )
    test_split: str = cli.flag(
        "test", "measured, never trained on; empty for none", cli.DATA
    )
    data_dir: str = cli.path_flag(
        "", "folder of TFDS; if empty, TFDS_DATA_DIR or its default", cli.DATA
    )
    per_class: int = cli.flag(
        0, "first n training images of each class; 0 for all", cli.DATA
    )
    image_size: int = cli.flag(
        0, "pixels that images are padded to with zeros; 0 to keep them", cli.DATA
    )
    augment: bool = cli.flag(False, "shift and mirror training images", cli.TRAINING)
    model: str = cli.flag("mlp", f"one of {', '.join(models.MODELS)}", cli.MODEL)
    width: float = cli.flag(
        1.0, "factor of the number of channels of every layer", cli.MODEL
    )
    use_bias: bool = cli.flag(True, "a bias in the classifier", cli.MODEL)
    compute_dtype: str = cli.flag(
        "auto", "float32, bfloat16, or auto: bfloat16 on accelerators", cli.TIME
    )
    epochs: int = cli.flag(100, "passes over the training set", cli.TRAINING)
    batch_size: int = cli.flag(128, "images in a step, over all devices", cli.TRAINING)
    learning_rate: float = cli.flag(
        0.05, "step size of stochastic gradient descent", cli.TRAINING
    )
    momentum: float = cli.flag(
        0.9, "share of the last step that the next one keeps", cli.TRAINING
    )
    weight_decay: float = cli.flag(0.0, "L2 penalty on all parameters", cli.TRAINING)
    schedule: str = cli.flag(
        "constant",
        "constant; step: rate / 10 after each third; step5: / 5 after each fifth",
        cli.TRAINING,
    )
    clock: str = cli.flag(
        "epoch",
        "epoch, or loss: steps grow as the loss falls, shrink where it rises",
        cli.TRAINING,
    )
    seed: int = cli.flag(0, "seed of initial weights and order of images", cli.SEEDS)
    seeds: int = cli.flag(1, "networks trained side by side, from one seed", cli.SEEDS)
    measurements: int = cli.flag(
        30, "number of epochs measured, at most; even in log log epoch", cli.TIME
    )
    checkpoint_every: int = cli.flag(10, "epochs between checkpoints, at most", cli.FOLDER)
    workdir: str = cli.path_flag(
        "", "run folder; if empty, a new one under runs/", cli.FOLDER
    )
    overwrite: bool = cli.flag(False, "replace the run that workdir holds", cli.FOLDER)
    resume: bool = cli.flag(False, "resume the run in workdir", cli.FOLDER)
    cpu_devices: int = cli.flag(
        1, "JAX devices that a CPU is split into; 1 is fastest", cli.MACHINE
    )


class Setup(NamedTuple):
    """Network and data of a config."""

    model: Any
    train_set: data.Dataset
    test_set: data.Dataset | None
    mean: np.ndarray
    deviation: np.ndarray


def run(config: Config, name: str, options: Mapping[str, Any]) -> Path:
    """Train, measure, and return the run folder.

    Write config.json, metrics.csv (a row per measured epoch, split and seed), collapse.csv
    and .md (metrics at zero training error and at the end), collapse and training as .png
    and .pdf, checkpoints/, tensorboard/ and, last, summary.json.

    Args:
      config: the flags.
      name: name of the experiment.
      options: options of the network besides width, bias and dtype.

    Raises:
      BadUse: a setting is out of range, the data do not fit, or the folder cannot be used;
        raised before anything is compiled.
      OSError: the data cannot be read, or a file cannot be written.
      RunFailed: training diverged.
    """
    check(config)
    config = _resolved(config)
    setup = set_up(config, options)
    _compare_data(setup)
    changes = {"epochs": functools.partial(_check_epochs, config)}
    with processes.open_config(config, name, OUTPUTS, changes) as (folder, finished):
        if finished:
            return folder
        start = time.perf_counter()
        with Interruption("epoch") as interruption:
            rows = _Loop(config, setup, folder).run(interruption)
        if processes.is_first():
            _finish(config, setup, folder, rows, time.perf_counter() - start)
    return folder


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("batch_size", "checkpoint_every"),
        (lambda value: value >= 1, "be at least 1"),
    ),
    **dict.fromkeys(
        ("epochs", "seeds", "measurements"),
        (lambda value: 1 <= value < 2**31, "be at least 1, and below 2**31"),
    ),
    **dict.fromkeys(
        ("per_class", "image_size"), (lambda value: value >= 0, "not be negative")
    ),
    "learning_rate": (lambda value: 0 < value < math.inf, "be positive and finite"),
    "momentum": (lambda value: 0 <= value < 1, "lie in [0, 1)"),
    "weight_decay": (lambda value: 0 <= value < math.inf, "be finite and not negative"),
    "seed": (lambda value: 0 <= value < 2**63, "lie in [0, 2**63)"),
    "schedule": (_SCHEDULES.__contains__, f"be one of {', '.join(_SCHEDULES)}"),
    "clock": (CLOCKS.__contains__, f"be one of {', '.join(CLOCKS)}"),
    "compute_dtype": (DTYPES.__contains__, f"be one of {', '.join(DTYPES)}"),
}


# Settings that --clock=loss needs: the rule of its steps is for plain descent.
_OF_LOSS_CLOCK = {
    "momentum": 0.0,
    "weight_decay": 0.0,
    "schedule": "constant",
    "augment": False,
}


def check(config: Config) -> None:
    """Raise BadUse if a setting is out of range, before any work."""
    for name, (holds, bound) in _RANGES.items():
        value = getattr(config, name)
        if not holds(value):
            raise BadUse(f"--{name} must {bound}, got {value!r}")
    if config.batch_size % jax.device_count():
        raise BadUse(
            f"--batch_size must be a multiple of the {jax.device_count()} devices, got "
            f"{config.batch_size}"
        )
    if config.clock == "loss":
        _check_loss_clock(config)
    parts = _SCHEDULES[config.schedule].parts
    if config.epochs < parts:
        raise BadUse(
            f"--schedule={config.schedule} needs --epochs of at least {parts}, got "
            f"{config.epochs}"
        )
    processes.check(config)
    rows = config.seeds * min(config.epochs, config.measurements)
    memory.check(8.0 * rows * len(LastLayer._fields), "--measurements or --seeds")


def _check_loss_clock(config: Config) -> None:
    """Raise BadUse unless the flags leave the steps to the clock of the loss."""
    wrong = [
        name for name, value in _OF_LOSS_CLOCK.items() if getattr(config, name) != value
    ]
    if wrong:
        needed = " ".join(_flag_text(name, _OF_LOSS_CLOCK[name]) for name in wrong)
        given = " ".join(_flag_text(name, getattr(config, name)) for name in wrong)
        raise BadUse(
            f"--clock=loss takes plain steps on the images: give {needed}, not {given}"
        )


def _flag_text(name: str, value: Any) -> str:
    """Return a flag as on the command line."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no{name}"
    return f"--{name}={value:g}" if isinstance(value, float) else f"--{name}={value}"


def _resolved(config: Config) -> Config:
    """Return the config with the dtype that "auto" selects on this machine.

    A run uses every device of the default backend, so that backend decides.
    """
    if config.compute_dtype != "auto":
        return config
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return dataclasses.replace(config, compute_dtype=dtype)


@checks()
def set_up(config: Config, options: Mapping[str, Any]) -> Setup:
    """Load the data, build the network, and check that they fit together.

    Raises:
      BadUse: they do not fit together.
      OSError: the data cannot be read.
    """
    model_options = {"width": config.width, "use_bias": config.use_bias, **options}
    models.build(
        config.model, 2, **model_options
    )  # a wrong name fails before the data are read
    train_set = _load(config, config.train_split, config.per_class)
    test_set = _load(config, config.test_split, 0) if config.test_split else None
    if test_set and test_set.images.shape[1:] != train_set.images.shape[1:]:
        raise BadUse(
            f"training images are {train_set.images.shape[1:]} but test images "
            f"{test_set.images.shape[1:]}"
        )
    if test_set and data.overlap(train_set, test_set):
        raise BadUse(
            f"--test_split={config.test_split} has images of "
            f"--train_split={config.train_split}: give another one, or --test_split="
        )
    if config.batch_size > len(train_set.labels):
        raise BadUse(
            f"--batch_size is {config.batch_size} but --train_split={config.train_split} "
            f"has {len(train_set.labels)} images"
        )
    model = models.build(
        config.model,
        train_set.num_classes,
        dtype=jnp.dtype(_resolved(config).compute_dtype),
        **model_options,
    )
    _check_network(config, model, train_set.images.shape[1:])
    _check_devices(config, model, [train_set, *filter(None, [test_set])])
    return Setup(model, train_set, test_set, *data.channel_statistics(train_set.images))


def _check_network(config: Config, model: Any, image_shape: Sequence[int]) -> None:
    """Raise BadUse unless the network takes the images and fits into memory."""
    try:
        parameters = models.count_parameters(model, image_shape)
    except (ValueError, OverflowError) as error:
        raise BadUse(
            f"{error} (--image_size={config.image_size}, --width={config.width})"
        ) from error
    memory.check(4.0 * parameters * config.seeds, "--width or --seeds")


def _check_devices(config: Config, model: Any, sets: Sequence[data.Dataset]) -> None:
    """Raise BadUse unless each device holds its part of the data and all networks.

    Parameters and their gradient take 8 bytes each. Several processes divide no data.
    """
    shares = jax.device_count() if jax.process_count() == 1 else 1
    images = sum(dataset.images.nbytes for dataset in sets)
    parameters = models.count_parameters(model, sets[0].images.shape[1:])
    memory.check_devices(
        images / shares + 8.0 * parameters * config.seeds,
        "--train_split, --test_split, --image_size, --width or --seeds",
        sizes.device_memory(jax.local_devices()),
    )


def _load(config: Config, split: str, per_class: int) -> data.Dataset:
    """Load a split that has every class, and pad its images if --image_size says so."""
    dataset = data.load(config.dataset, split, config.data_dir, per_class=per_class)
    counts = np.bincount(dataset.labels, minlength=dataset.num_classes)
    if len(counts) > dataset.num_classes or not counts.all():
        missing = np.flatnonzero(counts == 0).tolist()
        raise BadUse(
            f"every class needs an image, but {split!r} of {config.dataset} has none of "
            f"{missing}"
        )
    if config.image_size:
        *_, channels = dataset.images.shape
        padded = 1.0 * len(dataset.labels) * config.image_size**2 * channels
        memory.check(2 * padded, "--image_size")  # on the host and on the device
        dataset = dataset._replace(images=data.pad_to(dataset.images, config.image_size))
    return dataset


def _compare_data(setup: Setup) -> None:
    """Raise BadUse unless all processes have loaded the same data."""
    if jax.process_count() == 1:
        return
    sets = {"the training set": setup.train_set, "the test set": setup.test_set}
    digests = {
        f"the SHA-256 of {name}": _data_digest(part) for name, part in sets.items() if part
    }
    processes.compare(digests, "give every process the same data (--data_dir)")


def _data_digest(dataset: data.Dataset) -> str:
    """Return the start of the SHA-256 of images and labels, as loaded."""
    digest = hashlib.sha256()
    for array in (dataset.images, dataset.labels):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:12]


def _check_epochs(config: Config, folder: Path) -> None:
    """Raise BadUse unless the run in `folder` can be resumed up to `config.epochs`."""
    if names := _SCHEDULES[config.schedule].names:
        stored = folders.stored_config(folder).get("epochs")
        raise BadUse(
            f"--schedule={config.schedule} drops the learning rate at {names} of "
            f"--epochs={stored}: the run in {str(folder)!r} cannot be extended to "
            f"{config.epochs} epochs"
        )
    done = checkpoint.newest_epoch(folder / CHECKPOINTS) or 0
    if config.epochs < done:
        raise BadUse(
            f"the run in {str(folder)!r} has already trained {done} epochs: give --epochs "
            f"of at least {done}, got {config.epochs}"
        )


def make_mesh() -> Mesh:
    """Return a mesh of all devices of all processes; batches are split along its axis."""
    return Mesh(np.asarray(jax.devices()), (train.AXIS,))


def any_process(value: bool) -> bool:
    """Return whether `value` is true in any process, once all have called this."""
    if jax.process_count() == 1:
        return value
    mesh = make_mesh()
    split, replicated = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((train.AXIS,), ())
    )
    values = np.full(jax.local_device_count(), value)
    array = jax.make_array_from_process_local_data(split, values)
    return bool(_to_host(jax.jit(jnp.any, out_shardings=replicated)(array)))


class Trained(NamedTuple):
    """The last layer of a trained network, and its training features."""

    features: jax.Array  # (N, d) in evaluation mode
    labels: np.ndarray  # (N,)
    weight: jax.Array  # (K, d)
    bias: jax.Array | None  # (K,)
    epoch: int
    title: str


def stored_run(
    folder: Path, data_dir: str = "", seed: int = 0
) -> tuple[Config, dict[str, Any]]:
    """Return config and network options of a training run; arguments as `load_trained`.

    Raises:
      BadUse: the folder holds no run of a training experiment, or no checkpoint.
    """
    if "epochs" not in folders.stored_config(folder):
        raise BadUse(f"{str(folder)!r} holds no training run")
    stored = _stored.settings_of(folder, _stored.training_experiment(folder))
    shared = {field.name for field in dataclasses.fields(Config)}
    settings = {name: value for name, value in stored.items() if name in shared}
    handling = {"workdir": str(folder), "data_dir": data_dir, "test_split": ""}
    config = Config(**settings | handling)
    if not 0 <= seed < config.seeds:
        raise BadUse(f"expected a seed in [0, {config.seeds}), got {seed}")
    if not (folder / CHECKPOINTS).is_dir():
        raise BadUse(f"{str(folder)!r} holds no checkpoint")
    return config, {k: v for k, v in stored.items() if k not in shared}


def load_trained(folder: Path, data_dir: str = "", seed: int = 0) -> Trained:
    """Load the network of a training run from its newest checkpoint.

    Args:
      folder: folder of a run, finished or not; it is only read.
      data_dir: folder of TFDS, from which the training set is read again.
      seed: number of the network, of a run of several.

    Raises:
      BadUse: the folder holds no run of a training experiment, or no checkpoint.
      OSError: the data cannot be read.
    """
    config, options = stored_run(folder, data_dir, seed)
    setup = set_up(config, options)
    loop = _Loop(config, setup, folder)
    state, epoch = _newest_state(loop, folder)
    features = train.extract_features(loop.forward, state, loop.sets["train"])
    params = jax.tree.map(train.first_device, state.params)
    if config.seeds > 1:
        features, params = features[seed], jax.tree.map(lambda leaf: leaf[seed], params)
    title = f"{config.model} on {config.dataset}, epoch {epoch}"
    return Trained(
        features, setup.train_set.labels, *train.classifier(params), epoch, title
    )


def load_variables(
    config: Config, setup: Setup, folder: Path, seed: int
) -> tuple[dict[str, Any], int]:
    """Load the variables of one network from its newest checkpoint, and its epoch.

    Args:
      config: the first result of `stored_run`.
      setup: `set_up` of the results of `stored_run`.
      folder: folder of the run; it is only read.
      seed: number of the network.

    Raises:
      BadUse: the folder holds no checkpoint, or a damaged one.
    """
    state, epoch = _newest_state(_Loop(config, setup, folder), folder)
    collections = {"params": state.params, "batch_stats": state.batch_stats}
    collections = jax.tree.map(train.first_device, collections)
    if config.seeds > 1:
        collections = jax.tree.map(lambda leaf: leaf[seed], collections)
    return collections, epoch


def _newest_state(loop: "_Loop", folder: Path) -> tuple[train.TrainState, int]:
    """Return the newest state that a run has stored, and its epoch.

    Raises:
      BadUse: the folder holds no checkpoint, or a damaged one.
    """
    with contextlib.closing(_checkpoints(folder, read_only=True)) as checkpoints:
        epoch = checkpoints.newest()
        if epoch is None:
            raise BadUse(f"{str(folder)!r} holds no checkpoint")
        with checks():
            state, _ = checkpoints.restore(loop.start())
    return state, epoch


@checks()
def _checkpoints(folder: Path, *, read_only: bool = False) -> checkpoint.Checkpoints:
    """Open the checkpoints of a run, which are regular files."""
    reading.check_tree(folder / CHECKPOINTS)
    return checkpoint.Checkpoints(folder / CHECKPOINTS, read_only=read_only)


def measured_epochs(epochs: int, count: int) -> list[int]:
    """Return about `count` epochs from 1 to `epochs`, both included, even in log log."""
    if epochs <= count:
        return list(range(1, epochs + 1))
    low, high = math.log(math.log(2)), math.log(math.log(epochs))
    spaced = np.exp(np.exp(np.linspace(low, high, max(count - 1, 1))))
    return sorted({1, epochs, *np.rint(spaced).astype(int).tolist()})


class _Loop:
    """The training loop: its compiled functions, its rows, and the files that it writes."""

    def __init__(self, config: Config, setup: Setup, folder: Path):
        self.config, self.setup, self.folder = config, setup, folder
        self.mesh = make_mesh()
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.clock = _make_clock(config, setup, self.mesh)
        self.sets = {
            name: train.on_device(part, setup.mean, setup.deviation, self.mesh)
            for name, part in (("train", setup.train_set), ("test", setup.test_set))
            if part is not None
        }
        self.keys = jax.random.split(jax.random.key(config.seed), config.seeds)
        self._compile()
        self.rows: list[dict[str, Any]] = []
        self.last_drawing = -math.inf
        self.has_later_rows = False  # metrics.csv has rows after the checkpoint

    def _compile(self) -> None:
        """Compile the functions of one network, or of all seeds at once."""
        epoch = self.clock.epoch
        forward = train.make_forward(self.setup.model, self.mesh)
        if self.config.seeds > 1:
            epoch = jax.vmap(epoch, in_axes=(0, None, 0))
            forward = jax.vmap(forward, in_axes=(0, None, None))
        self.epoch = jax.jit(epoch, donate_argnums=0, out_shardings=self.replicated)
        self.forward = jax.jit(forward, out_shardings=self.replicated)

    def _keys_of(self, epoch: int) -> jax.Array:
        """Return the key of an epoch, or one per seed; epoch 0 is the initialisation."""
        keys = jax.vmap(lambda key: jax.random.fold_in(key, epoch))(self.keys)
        return keys if self.config.seeds > 1 else keys[0]

    def start(self) -> train.TrainState:
        """Return a fresh state, or one per seed with a leading axis."""
        draw = self.clock.start
        if self.config.seeds > 1:
            draw = jax.vmap(draw, in_axes=(0, None))
        draw = jax.jit(draw, out_shardings=self.replicated)
        return draw(self._keys_of(0), self.sets["train"])

    def run(self, interruption: Interruption) -> list[dict[str, Any]]:
        """Train for the remaining epochs, and return the rows of metrics.csv.

        Raises:
          KeyboardInterrupt: a signal requested a stop; the state has been saved.
          RunFailed: the loss of every seed is NaN or infinite.
        """
        config = self.config
        with contextlib.ExitStack() as stack:
            checkpoints = _checkpoints(self.folder)
            stack.callback(checkpoints.close)
            state, done = self.restore(checkpoints)
            events = self._events(stack, done)
            bar = stack.enter_context(self._bar(done))
            to_measure = set(measured_epochs(config.epochs, config.measurements))
            if self.has_later_rows or (done in to_measure and self._last() < done):
                self._measure(state, done, events)  # --epochs was another number before
            for epoch in range(done + 1, config.epochs + 1):
                state, log = self.epoch(state, self.sets["train"], self._keys_of(epoch))
                log = _to_host(log)
                self._check_finite(log, epoch)
                bar.set_postfix(self.clock.progress(log))
                bar.update()
                _write_events(events, epoch, log._asdict())
                if epoch in to_measure:
                    self._measure(state, epoch, events)
                stop = any_process(interruption.requested) and epoch < config.epochs
                if stop or epoch in to_measure or epoch % config.checkpoint_every == 0:
                    checkpoints.save(epoch, state, self._notes())
                if stop:
                    raise KeyboardInterrupt
        return self.rows

    def restore(self, checkpoints) -> tuple[train.TrainState, int]:
        """Return the state to resume from, and the number of epochs that it has trained.

        Raises:
          BadUse: the checkpoint or metrics.csv is damaged.
        """
        state = self.start()
        done = checkpoints.newest() if self.config.resume else None
        if done is None:
            return state, 0
        with checks():
            state, notes = checkpoints.restore(state)
        rows = _record.read_rows(self.folder, up_to=done)
        last_measured = int(notes.get(_LAST_MEASURED, done))
        self.rows = [row for row in rows if row["epoch"] <= last_measured]
        digest = notes.get(_record.METRICS_FILE)  # earlier versions have none
        if not self.rows or digest not in (None, _record.digest(self.rows)):
            raise BadUse(
                f"{self.folder / _record.METRICS_FILE} is missing or damaged: give "
                "--overwrite to start again"
            )
        self.has_later_rows = len(rows) > len(self.rows)
        return state, done

    def _events(self, stack: contextlib.ExitStack, done: int) -> Events | None:
        """Return the writer of TensorBoard events; None in all processes but the first."""
        if not processes.is_first():
            return None
        events = Events(self.folder / _TENSORBOARD, purge_epoch=done + 1)
        stack.callback(events.close)
        return events

    def _bar(self, done: int) -> tqdm:
        """Return a progress bar over epochs."""
        return tqdm(
            total=self.config.epochs,
            initial=done,
            desc=f"{self.config.model} on {self.config.dataset}",
            unit="epoch",
            disable=not processes.is_first(),
        )

    def _last(self) -> int:
        """Return the last epoch measured."""
        return self.rows[-1]["epoch"]

    def _notes(self) -> dict[str, str]:
        """Return notes for a checkpoint: digest and last epoch of metrics.csv."""
        digest = _record.digest(self.rows)
        return {_record.METRICS_FILE: digest, _LAST_MEASURED: str(self._last())}

    def _check_finite(self, log: Any, epoch: int) -> None:
        """Raise RunFailed if training diverged in all seeds."""
        self.clock.check(log, epoch)

    def _measure(self, state: train.TrainState, epoch: int, events) -> None:
        """Measure this epoch, write metrics.csv and, from time to time, the figures."""
        centres: list[Any] = [None] * self.config.seeds  # of the training split, for NC4
        columns = _to_host(self.clock.columns(state))
        for split, dataset in self.sets.items():
            features = train.extract_features(self.forward, state, dataset)
            networks = [
                self._network(features, state.params, seed)
                for seed in range(self.config.seeds)
            ]
            measured = [
                _measure_one(*network, dataset.labels, centre)
                for network, centre in zip(networks, centres, strict=True)
            ]
            if split == "train" and "test" in self.sets:
                centres = [
                    train.class_means(features, dataset.labels, params)
                    for features, params in networks
                ]
            for seed, values in enumerate(measured):
                row = {"epoch": epoch, "split": split, "seed": seed}
                times = {k: _record.rounded(np.ravel(v)[seed]) for k, v in columns.items()}
                self.rows.append(row | times | values)
            tags = {f"{split}/{k}": [v[k] for v in measured] for k in measured[0]}
            _write_events(events, epoch, tags)
        if processes.is_first():
            _record.write_rows(self.folder, self.rows)
            if time.monotonic() - self.last_drawing > _FIGURE_SECONDS:
                _record.draw(self.folder, self.rows)
                self.last_drawing = time.monotonic()

    def _network(self, features, params, seed: int) -> tuple[Any, Any]:
        """Return features (N, d) and parameters of one seed."""
        if self.config.seeds == 1:
            return features, params
        return features[seed], jax.tree.map(lambda leaf: leaf[seed], params)


def _measure_one(features, params, labels, centres) -> dict[str, float]:
    """Return the metrics of one network, rounded as in metrics.csv; NaN if it diverged."""
    last = _ready((features, *train.classifier(params)))
    if any(count_not_finite(leaf) for leaf in jax.tree.leaves(last)):
        names = (*ncjax.CollapseMetrics._fields, *LastLayer._fields)
        return dict.fromkeys(names, math.nan)
    measured = train.measure(features, labels, params, centres)
    return {name: _record.rounded(value) for name, value in measured.items()}


def _make_clock(config: Config, setup: Setup, mesh: Mesh) -> _clock.Clock:
    """Return the clock that the flags select."""
    shape, batch_size = setup.train_set.images.shape[1:], config.batch_size
    of_model = (setup.model, shape, config.learning_rate)
    if config.clock == "loss":
        return _clock.of_loss(*of_model, batch_size=batch_size, mesh=mesh)
    return _clock.of_epochs(
        *of_model,
        optimiser=_optimiser(config, len(setup.train_set.labels)),
        batch_size=batch_size,
        mesh=mesh,
        augment=config.augment,
    )


def _optimiser(config: Config, samples: int):
    """Return the optimiser that the flags select."""
    steps = samples // config.batch_size
    parts, factor, _ = _SCHEDULES[config.schedule]
    ends = (part * config.epochs // parts for part in range(1, parts))
    return train.sgd(
        config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        drops=tuple(epoch * steps for epoch in ends),
        factor=factor,
    )


def _to_host(tree):
    """Return the arrays of the first local device in NumPy; handle signals meanwhile."""
    return jax.tree.map(np.asarray, _ready(tree))


def _ready(tree):
    """Return the arrays of the first local device once they are computed.

    Signals are handled meanwhile.
    """
    for leaf in jax.tree.leaves(tree):
        while not leaf.is_ready():
            time.sleep(_POLL_SECONDS)
    return jax.tree.map(train.first_device, tree)


def _write_events(events: Events | None, epoch: int, values: Mapping[str, Any]) -> None:
    """Write means over seeds to TensorBoard."""
    if events:
        events.add(epoch, {name: float(np.mean(value)) for name, value in values.items()})


def _finish(config: Config, setup: Setup, folder: Path, rows, seconds: float) -> None:
    """Write figures, table and last summary.json, which marks the end."""
    _record.draw(folder, rows)
    of_train, of_test = _record.columns(rows, "train"), _record.columns(rows, "test")
    zero = _record.zero_error_epoch(of_train)
    table = _record.table(of_train, of_test, zero)
    files.write_table(folder / "collapse", table)
    summary = {
        "parameters": models.count_parameters(
            setup.model, setup.train_set.images.shape[1:]
        ),
        "training_images": len(setup.train_set.labels),
        "zero_training_error_from_epoch": zero,
        "seconds_of_this_process": round(seconds, 1),
        "metrics": {row["metric"]: row for row in table},
    }
    folders.write_summary(folder, summary | folders.provenance(*_PACKAGES), OUTPUTS)
    print((folder / "collapse.md").read_text())
    print(_ending(config, folder, zero))


def _ending(config: Config, folder: Path, zero: int | None) -> str:
    """Return the epoch of zero training error, or the command that trains longer."""
    if zero:
        return f"zero training error from epoch {zero}"
    text = f"training error is not zero after {config.epochs} epochs"
    if config.schedule != "constant":  # drops depend on the number of epochs
        return text
    longer = dataclasses.replace(config, epochs=2 * config.epochs)
    return f"{text}; train on with: {folders.resume_command(longer, folder)}"
