"""The loop of a network flow: steps, rows and checkpoints of one seed after the other."""

import contextlib
import functools
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ncjax
from experiments import _flow_record, _record, _training
from experiments._last_layer import describe
from experiments._runs import files, reading
from experiments._runs.errors import BadUse, checks
from experiments._runs.interruption import Interruption
from experiments._runs.progress import tqdm
from ncjax.metrics.duality import duality_parts
from ncjax.networks import checkpoint, flow, full_batch, models, train
from ncjax.networks.homogeneous import homogeneity, squared_norm_differences

CHECKPOINTS = "checkpoints"
REACHED, SPENT, STUCK, NOT_FINITE = range(4)
ENDINGS = (
    "came to the end",
    "--max_gradients is spent",
    "no step is short enough, or rounding stops the flow",
    "the loss of the start is NaN or infinite",
)
# A row is measured only where the excess is below this: see `ncjax.networks.flow`.
_SETTLED_EXCESS = 1.5
_LAST_MEASURED, _SEED = "gradients at the last row", "seed"  # in a checkpoint's notes
_CHECKPOINT_SECONDS = 60.0
_FIGURE_SECONDS = 30.0
_PEELED_PER_CLASS = 20


class Programs(NamedTuple):
    """The compiled functions of a network and its training set."""

    init: Any  # key -> variables
    begin: Any  # params -> FlowState
    step: Any  # FlowState -> FlowState, whether it is stalled
    features: Any  # params -> features (N, d), labels (N,), in training mode
    statistics: Any  # params -> batch statistics
    forward: Any  # of `train.make_forward`


class Loop:
    """The seeds of a run, and what they have measured."""

    def __init__(self, config, setup: _training.Setup, folder: Path, checkpoints: Path):
        """Prepare; nothing is compiled yet."""
        self.config, self.setup, self.folder = config, setup, folder
        self.checkpoints = checkpoints
        self.mesh = _training.make_mesh()
        self.method = flow.make_method(config.method, config.max_stages)
        self.degree = models.degree(setup.model) if config.norm == "none" else 0
        self.programs = self._compile()
        self.rows: list[dict[str, Any]] = []
        self.stored: list[dict[str, Any]] = []  # rows of the run that is resumed
        self.drawn = time.monotonic()
        self.last: Any = None  # features, labels and parameters of seed 0 at its end

    def _compile(self) -> Programs:
        model = self.setup.model
        groups = full_batch.split(self.setup.train_set, self.config.num_groups)

        def with_groups(function):
            compiled = jax.jit(function)
            return lambda *arguments: compiled(groups, *arguments)

        def begin(groups, params):
            return flow.begin(functools.partial(full_batch.log_loss, model, groups), params)

        def step(groups, state):
            loss = functools.partial(full_batch.log_loss, model, groups)
            state = flow.advance(loss, self.method, state)
            return state, flow.is_stalled(state)

        shape = self.setup.train_set.images.shape[1:]
        images = jnp.zeros((1, *shape), jnp.float32)
        return Programs(
            init=jax.jit(lambda key: model.init(key, images)),
            begin=with_groups(begin),
            step=with_groups(step),
            features=with_groups(functools.partial(full_batch.features, model)),
            statistics=with_groups(functools.partial(full_batch.batch_statistics, model)),
            forward=jax.jit(train.make_forward(model, self.mesh)),
        )

    def run(self, interruption: Interruption) -> list[dict[str, Any]]:
        """Follow every seed to its end, and return how each ended.

        Raises:
          KeyboardInterrupt: a signal requested a stop; the state has been saved.
          BadUse: a checkpoint or metrics.csv is damaged.
        """
        if self.config.resume:
            self.stored = _flow_record.read_rows(self.folder)
        return [self._run_seed(seed, interruption) for seed in range(self.config.seeds)]

    def _run_seed(self, seed: int, interruption: Interruption) -> dict[str, Any]:
        """Follow one seed to its end."""
        folder = self.checkpoints / f"seed{seed}"
        with contextlib.ExitStack() as stack:
            with checks():
                checkpoints = checkpoint.Checkpoints(folder)
            stack.callback(checkpoints.close)
            state = self._restore(seed, checkpoints, interruption)
            bar = stack.enter_context(self._bar(seed, state))
            saved, stalled = time.monotonic(), bool(flow.is_stalled(state))
            while (result := self._result(state, stalled)) is None:
                refused = int(state.refused)
                state, stalled = self.programs.step(state)
                if int(state.refused) == refused and self._is_due(seed, state):
                    self._measure(seed, state)
                _show(bar, state)
                if interruption.requested or time.monotonic() - saved > _CHECKPOINT_SECONDS:
                    self._save(checkpoints, seed, state)
                    saved = time.monotonic()
                if interruption.requested:
                    raise KeyboardInterrupt
            if result != NOT_FINITE:
                self._end(seed, state)
            self._save(checkpoints, seed, state)
        return {
            "result": result,
            "log_t": float(state.log_time),
            "log_loss": float(state.log_loss),
            "gradients": int(state.gradients),
            "refused": int(state.refused),
        }

    def _start(self, seed: int, interruption: Interruption) -> flow.FlowState:
        """Return the state of a seed at t = 0, after the warm epochs."""
        variables = self._draw(seed)
        params = variables["params"]
        if self.config.warm_epochs:
            params = self._warm_up(variables, self._key(seed), interruption)
        return self.programs.begin(params)

    def _key(self, seed: int) -> jax.Array:
        return jax.random.split(jax.random.key(self.config.seed), self.config.seeds)[seed]

    def _draw(self, seed: int) -> Any:
        """Return the initial variables of a seed."""
        variables = self.programs.init(self._key(seed))
        scale = self.config.init_scale
        params = jax.tree.map(lambda leaf: scale * leaf, variables["params"])
        return variables | {"params": params}

    def _warm_up(self, variables, key, interruption: Interruption) -> Any:
        """Return the parameters after the warm epochs of mini-batches.

        Raises:
          KeyboardInterrupt: a signal requested a stop; a resumed run warms up again.
        """
        optimiser = train.sgd(self.config.learning_rate)
        epoch = train.make_epoch(
            self.setup.model,
            optimiser,
            batch_size=self.config.batch_size,
            mesh=self.mesh,
        )
        epoch = jax.jit(epoch, donate_argnums=0)
        params = variables["params"]
        averages = variables.get("batch_stats", {})
        state = train.TrainState(params, averages, optimiser.init(params))
        dataset = self._on_device(self.setup.train_set)
        with tqdm(range(1, self.config.warm_epochs + 1), desc="warm epochs") as bar:
            for number in bar:
                state, log = epoch(state, dataset, jax.random.fold_in(key, number))
                bar.set_postfix(loss=f"{float(log.loss):.3g}")
                if interruption.requested:
                    raise KeyboardInterrupt
        return state.params

    def _on_device(self, dataset) -> train.DeviceData | train.DividedData:
        setup = self.setup
        return train.on_device(dataset, setup.mean, setup.deviation, self.mesh)

    def _restore(
        self, seed: int, checkpoints, interruption: Interruption
    ) -> flow.FlowState:
        """Return the state to go on from, and keep the rows that belong to it.

        Raises:
          BadUse: the checkpoint or metrics.csv is damaged.
        """
        if not self.config.resume or checkpoints.newest() is None:
            return self._start(seed, interruption)
        state, notes = self._read(checkpoints, seed)
        # Later rows: of steps after the checkpoint, or of the end of a shorter run.
        last = int(notes.get(_LAST_MEASURED, state.gradients))
        stored = [row for row in self.stored if row["seed"] == seed]
        rows = [row for row in stored if row["gradients"] <= last]
        if _record.digest(rows) != notes.get(_record.METRICS_FILE):
            raise BadUse(
                f"{self.folder / _record.METRICS_FILE} is missing or damaged: give "
                "--overwrite to start again"
            )
        self.rows += _flow_record.on_grid(rows, self.config.measurements)
        return state

    def _read(self, checkpoints, seed: int) -> tuple[flow.FlowState, dict[str, str]]:
        """Return state and notes of the newest checkpoint of a seed.

        Raises:
          BadUse: it is damaged, or another seed's.
        """
        with checks():
            state, notes = checkpoints.restore(self._empty_state(seed))
        found = notes.get(_SEED, str(seed))  # earlier versions stored no seed
        if found != str(seed):
            raise BadUse(
                f"{self.checkpoints / f'seed{seed}'} holds the checkpoint of seed {found}: "
                "rename the folder back"
            )
        return state, notes

    def _empty_state(self, seed: int) -> flow.FlowState:
        """Return zeros in the shapes of a state."""
        shapes = jax.eval_shape(lambda: self.programs.begin(self._draw(seed)["params"]))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def load_variables(self, seed: int) -> tuple[dict[str, Any], float]:
        """Load the variables of a seed from its newest checkpoint, and their log t.

        They are for evaluation mode. The checkpoints are only read.

        Raises:
          BadUse: there is no checkpoint, or it is damaged.
        """
        folder = self.checkpoints / f"seed{seed}"
        if not folder.is_dir():
            raise BadUse(f"{str(self.folder)!r} holds no checkpoint of seed {seed}")
        with checks():
            reading.check_tree(self.checkpoints)
            checkpoints = checkpoint.Checkpoints(folder, read_only=True)
        with contextlib.closing(checkpoints), checks():
            if checkpoints.newest() is None:
                raise BadUse(f"{str(self.folder)!r} holds no checkpoint of seed {seed}")
            state, _ = self._read(checkpoints, seed)
        averages = self.programs.statistics(state.params)
        collections = {"params": state.params, "batch_stats": averages}
        return collections, float(state.log_time)

    def _save(self, checkpoints, seed: int, state: flow.FlowState) -> None:
        """Write a checkpoint, by the number of gradients."""
        if checkpoints.newest() == int(state.gradients):
            return
        rows = self._rows_of(seed)
        last = rows[-1]["gradients"] if rows else 0
        digest = _record.digest(rows)
        notes = {_record.METRICS_FILE: digest, _LAST_MEASURED: str(last), _SEED: str(seed)}
        checkpoints.save(int(state.gradients), state, notes)

    def _rows_of(self, seed: int) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["seed"] == seed]

    def _result(self, state: flow.FlowState, stalled: bool) -> int | None:
        """Return how the seed ended, None if it goes on."""
        if not math.isfinite(state.log_loss):
            return NOT_FINITE
        if state.log_time >= self.config.log_t_max and self._is_settled(state):
            return REACHED
        if state.gradients >= self.config.max_gradients:
            return SPENT
        return STUCK if stalled else None

    def _is_settled(self, state: flow.FlowState) -> bool:
        """Return whether the point lies on the smooth path of the flow."""
        early = state.log_time < self.method.settled
        return bool(early or state.excess < _SETTLED_EXCESS)

    def _is_due(self, seed: int, state: flow.FlowState) -> bool:
        """Return whether log t has passed the next time of the grid.

        A point off the smooth path waits, until the time after that one has passed as well.
        """
        rows = self._rows_of(seed)
        last = rows[-1]["log_t"] if rows else 0.0
        due = _flow_record.next_time(last, self.config.measurements)
        overdue = _flow_record.next_time(due, self.config.measurements)
        return float(state.log_time) >= (due if self._is_settled(state) else overdue)

    def _measure(self, seed: int, state: flow.FlowState) -> tuple[Any, Any]:
        """Add a row for each split, and return features and labels of training."""
        features, labels = self.programs.features(state.params)
        head = {
            "seed": seed,
            "log_t": float(state.log_time),
            "gradients": int(state.gradients),
            "excess": float(state.excess),
        }
        values = train.measure(features, labels, state.params)
        parts = duality_parts(features, labels, *train.classifier(state.params))
        values |= {name: float(value) for name, value in parts._asdict().items()}
        if self.degree:
            values |= self._homogeneity(state, values["least_margin"])
        self.rows.append(_flow_record.row("train", head, values))
        if self.setup.test_set is not None:
            centres = train.class_means(features, labels, state.params)
            test = self._evaluate(self.setup.test_set, state.params)
            tested = train.measure(*test, state.params, centres)
            missing = dict.fromkeys(values.keys() - tested.keys(), math.nan)
            self.rows.append(_flow_record.row("test", head, tested | missing))
        self._write(seed)
        return features, labels

    def _homogeneity(self, state: flow.FlowState, least_margin: float) -> dict[str, float]:
        """Return margin, alignment and growth of a homogeneous network."""
        found = homogeneity(
            state.params,
            state.slope,
            state.log_loss,
            state.log_time,
            least_margin,
            self.degree,
        )
        layers = models.weight_layers(self.setup.model)
        differences = squared_norm_differences(state.params, layers)
        names = {"squared_norm": "theta_squared_norm", "kkt_angle": "theta_kkt_angle"}
        values = {names.get(k, k): float(v) for k, v in found._asdict().items()}
        # Of the last and the first layer: conserved on the flow.
        return values | {"norm_difference": float(jnp.sum(differences))}

    def _evaluate(self, dataset, params) -> tuple[Any, Any]:
        """Return features in evaluation mode, and labels."""
        state = train.TrainState(params, self.programs.statistics(params), ())
        on_device = self._on_device(dataset)
        features = train.extract_features(self.programs.forward, state, on_device)
        return features, on_device.labels

    def _write(self, seed: int) -> None:
        """Write metrics.csv and, from time to time, the figures."""
        later = [row for row in self.stored if row["seed"] > seed]
        _record.write_rows(self.folder, self.rows + later)
        if time.monotonic() - self.drawn > _FIGURE_SECONDS:
            _flow_record.draw(self.folder, self.rows)
            self.drawn = time.monotonic()

    def _end(self, seed: int, state: flow.FlowState) -> None:
        """Measure the end of a seed, and keep the last layer of seed 0."""
        rows = self._rows_of(seed)
        if not rows or rows[-1]["gradients"] < int(state.gradients):
            features, labels = self._measure(seed, state)
        else:
            features, labels = self.programs.features(state.params)
        if seed == 0:
            self.last = features, labels, state.params

    def describe_end(self) -> dict[str, Any]:
        """Describe the last layer of seed 0 at its end, and evaluation mode there.

        Write peel.csv and peel.md.
        """
        if self.last is None:
            return {}
        features, labels, params = self.last
        least = int(np.bincount(np.asarray(labels)).min())
        last = [
            None if leaf is None else leaf.astype(jnp.float64)
            for leaf in (features, *train.classifier(params))
        ]
        point = ncjax.peel(
            last[0], labels, *last[1:], per_class=min(least, _PEELED_PER_CLASS)
        )
        found = describe(ncjax.balance_norms(point))
        table = [{"quantity": k, "at equal norms": v} for k, v in found.items()]
        files.write_table(self.folder / "peel", table)
        evaluated = self._evaluate(self.setup.train_set, params)
        return {
            "last_layer": found,
            "evaluation_mode": train.measure(*evaluated, params),
        }

    def _bar(self, seed: int, state: flow.FlowState) -> tqdm:
        """Return a progress bar over log t."""
        config = self.config
        name = f"{config.model} on {config.dataset}"
        bar = tqdm(
            total=config.log_t_max,
            desc=f"{name}, seed {seed}" if config.seeds > 1 else name,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]{postfix}",
        )
        _show(bar, state)
        return bar


def _show(bar: tqdm, state: flow.FlowState) -> None:
    """Show log t, log L and the gradients so far."""
    reached = min(float(state.log_time), float(bar.total or 0))
    bar.update(max(reached - bar.n, 0))
    bar.set_postfix(
        log_t=f"{float(state.log_time):.4g}",
        log_L=f"{float(state.log_loss):.4g}",
        gradients=int(state.gradients),
    )
