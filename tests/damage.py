"""Small runs with stand-ins for the numerics, and what can happen to their files.

A stand-in is a sum: quick, deterministic, and different if any number read from a file is
different. The experiments' own code writes, reads, checks and reports.
"""

import contextlib
import functools
import os
import shutil
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import ncjax
from experiments import (
    _deep_flows,
    _deep_results,
    _legs,
    _neighbours_parts,
    _neighbours_results,
    _training,
    deep_flow,
    neighbours,
    peel,
    saddle_analysis,
    theorems,
    train_small,
    ulpm_flow,
)
from experiments._runs import files, folders
from ncjax import plotting
from ncjax.flow.solve import SUCCESS
from ncjax.metrics.peeling import LastLayer
from ncjax.networks import data, models, train

RESULTS = Path(__file__).parents[1] / "results"
MODULES = {
    module.NAME: module
    for module in (
        *(ulpm_flow, saddle_analysis, theorems, train_small, peel),
        *(deep_flow, neighbours),
    )
}
CONFIGS = {
    "ulpm_flow": ulpm_flow.Config(
        seeds=2, num_classes=2, per_class=1, dim=2, log_t_max=20.0, num_times=20
    ),
    "saddle_analysis": saddle_analysis.Config(),
    "theorems": theorems.Config(),
    "train_small": train_small.Config(
        train_split="train[:200]",
        test_split="",
        epochs=4,
        batch_size=100,
        measurements=3,
        checkpoint_every=2,
    ),
    "peel": peel.Config(num_times=20),
    "deep_flow": deep_flow.Config(num_classes="4", factors="3", widths="1", seeds=1),
    "neighbours": neighbours.Config(),
}


def stand_in(patch):
    """Replace slow functions by stand-ins."""
    _for_flows(patch)
    _for_training(patch)
    _for_parts(patch)
    for name in ("saddle_analysis", "theorems"):
        patch.setattr(MODULES[name], "_run", functools.partial(_committed, name))
    patch.setattr(peel, "_peel", _peeled)
    patch.setattr(peel, "describe", _described)
    files = plotting.render(Figure(figsize=(1, 1)))
    patch.setattr(plotting, "render", lambda figure: files)
    for name in ("figure_over_log_log_t", "figure_over_log_log_epochs"):
        patch.setattr(plotting, name, lambda *_args, **_kwargs: None)


def _committed(name, config, folder):
    """Copy the run of `results/` into the folder."""
    summary = files.read_json(RESULTS / name / "summary.json")
    for path in (RESULTS / name).iterdir():
        if path.suffix in (".csv", ".md", ".png", ".pdf"):
            content = path.read_bytes() if path.suffix in (".csv", ".md") else b""
            files.write_atomically(folder / path.name, content)
    folders.write_summary(folder, summary, MODULES[name].OUTPUTS)


def _for_flows(patch):
    names = (*ncjax.CollapseMetrics._fields, "log_loss", "squared_norm", "margin_ratio")
    names += ("kkt_angle", "balance_drift", "classifier_sum_drift")

    def compile_legs(starts, measure, solver, max_steps):
        def flow(states, leg, before):
            end = ncjax.Params(*(np.asarray(leaf) * 1.01 + leg[-1] for leaf in states))
            counts = dict.fromkeys(("num_steps", "num_rejected"), np.ones(len(end.W)))
            result = np.full(len(end.W), SUCCESS)
            return SimpleNamespace(params=end, final=end, result=result, **counts)

        def columns(states, starts):
            sums = np.asarray(states.W).sum((1, 2)) + np.asarray(states.H).sum((1, 2, 3))
            return {
                name: (np.abs(sums) * (i + 1) % 1.0)[:, None]
                for i, name in enumerate(names)
            }

        return flow, columns

    patch.setattr(_legs, "_compile", compile_legs)
    patch.setattr(_legs, "choose_solver", lambda *_: "explicit")


def _for_parts(patch):
    """Replace the experiments that save arrays after each of their parts."""

    def flow_of(cell, *_):
        return {"state": np.linspace(0, cell.scale, 5)}

    def parts(sizes, config):
        return {f"part/{i}": lambda i=i: {"state": np.arange(3.0) + i} for i in range(3)}

    def results(name, tables, stored, others):
        committed = files.read_json(RESULTS / name / "summary.json")
        sums = [{"part": k, "sum": float(v.sum())} for k, v in sorted(stored.items())]
        tables = {table: committed[table] for table in tables}
        totals = {k: committed.get(k) for k in ("starts", "settled", "failed", "near")}
        totals |= {f"value_error_{k}": sums[0]["sum"] for k in ("median", "worst")}
        return SimpleNamespace(tables=tables, totals=totals, **others(sums))

    def deep(cells, stored):
        return results(
            *("deep_flow", ("shares", "codes"), stored),
            others=lambda sums: {"ends": sums, "trajectory": sums, "figure": None},
        )

    def compared(stored, models, decay):
        figures = dict.fromkeys(("flows", "path", "minority"))
        return results(
            *("neighbours", ("models", "path", "minority"), stored),
            others=lambda sums: {"flows": sums, "figures": figures},
        )

    patch.setattr(_deep_flows, "flow_of", flow_of)
    patch.setattr(_deep_results, "of", deep)
    patch.setattr(_neighbours_parts, "parts", parts)
    patch.setattr(_neighbours_parts, "labels", lambda sizes: {})
    patch.setattr(_neighbours_results, "of", compared)


def _for_training(patch):
    kernel = np.linspace(0.1, 0.9, 70, dtype=np.float32).reshape(7, 10)
    params = {"classifier": {"kernel": kernel, "bias": kernel[0]}}
    start = train.TrainState(params, {}, {"momentum": kernel})
    start = jax.tree.map(jnp.asarray, start)

    def compile_loop(self):
        self.forward = None

        def epoch(state, dataset, key):
            log = train.EpochLog(jnp.float32(1), jnp.float32(1))
            return jax.tree.map(lambda leaf: leaf * np.float32(1.01), state), log

        self.epoch = epoch

    def measure_one(features, params, labels, centres):
        total = float(np.asarray(features)[0, 0])
        names = (*ncjax.CollapseMetrics._fields, *LastLayer._fields)
        values = {name: total * (i + 1) % 1.0 for i, name in enumerate(names)}
        return {name: float(f"{value:.9g}") for name, value in values.items()}

    def extract_features(forward, state, dataset):
        sums = [np.asarray(leaf, np.float64).sum() for leaf in jax.tree.leaves(state)]
        return jnp.full((len(dataset.labels), 7), sum(sums))

    patch.setattr(_training._Loop, "_compile", compile_loop)
    patch.setattr(_training._Loop, "start", lambda self: start)
    patch.setattr(_training, "_measure_one", measure_one)
    patch.setattr(train, "class_means", lambda features, labels, params: None)
    patch.setattr(train, "extract_features", extract_features)
    patch.setattr(data, "load", functools.cache(data.load))
    patch.setattr(models, "count_parameters", lambda *_: 80)


def _peeled(trained, per_class):
    """Return a point that depends on the checkpoint and on the labels."""
    shift = float(trained.features[0, 0]) + float(trained.labels.sum())
    return ncjax.Params(
        np.asarray(trained.weight, np.float64)[:2, :2] + shift, np.ones((2, 1, 2))
    )


def _described(point):
    names = ("squared_norm", "margin_ratio", "kkt_angle", "sigma_max", "self_duality")
    return {name: float(np.sum(point.W)) for name in names} | {"verdict": "unknown"}


def run(name, folder, **changes):
    """Run an experiment in a folder; `peel` reads the training run beside it."""
    values = {"workdir": str(folder)} | changes
    if name == "peel":
        values.setdefault("run", str(folder.parent / "source"))
    config = MODULES[name].Config(**vars(CONFIGS[name]) | values)
    return MODULES[name].run(config)


def interrupted(patch, name, folder):
    """Start a run of an experiment in a folder and interrupt it half way."""
    with patch.context() as once:
        if name == "train_small":
            save = _training.checkpoint.Checkpoints.save

            def stop(self, epoch, *state):
                save(self, epoch, *state)
                if epoch == 2:
                    raise KeyboardInterrupt

            once.setattr(_training.checkpoint.Checkpoints, "save", stop)
        elif name in ("deep_flow", "neighbours"):
            save_arrays = folders.save_checkpoint

            def stop(folder, arrays):
                save_arrays(folder, arrays)
                if len(arrays) == 3:  # two parts and the time
                    raise KeyboardInterrupt

            once.setattr(folders, "save_checkpoint", stop)
        else:
            save_leg = _legs._save

            def stop(folder, progress):
                save_leg(folder, progress)
                if progress.legs_done == 7:
                    raise KeyboardInterrupt

            once.setattr(_legs, "_save", stop)
        try:
            run(name, folder)
        except KeyboardInterrupt:
            return folder
    raise AssertionError("it was not interrupted")


def _flipped(path, where):
    content = bytearray(path.read_bytes())
    if content:
        content[int(where * len(content))] ^= 1 << int(where * 8e6) % 8
    path.write_bytes(content)


def _to_folder(path, where):
    path.unlink()
    path.mkdir()


def _to_pipe(path, where):
    path.unlink()
    os.mkfifo(path)


def _to_socket(path, where):
    """Bind a socket by a short name, because its address is limited to 100 bytes."""
    path.unlink()
    descriptor = os.open(path.parent, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{descriptor}/{path.name}")
    finally:
        os.close(descriptor)


def _to_link(path, where):
    """Move the file out of the run and leave a link to it."""
    target = outside(path)
    shutil.move(path, target)
    path.symlink_to(target)


def _to_device(path, where):
    path.unlink()
    path.symlink_to("/dev/zero")


def outside(path):
    """Return the file beside the run that a link leads to."""
    return next(p for p in path.parents if p.name == "case").parent / "elsewhere"


# Each damages a file at a relative place in [0, 1).
DAMAGES = {
    "cut": lambda path, where: path.write_bytes(
        path.read_bytes()[: int(where * path.stat().st_size)]
    ),
    "a bit flipped": _flipped,
    "emptied": lambda path, where: path.write_bytes(b""),
    "deleted": lambda path, where: path.unlink(),
    "a folder instead": _to_folder,
    "noise": lambda path, where: path.write_bytes(
        np.random.default_rng(int(where * 1e9)).bytes(path.stat().st_size)
    ),
    "a named pipe instead": _to_pipe,
    "a socket instead": _to_socket,
    "a link instead": _to_link,
    "a link to a device instead": _to_device,
    "something appended": lambda path, where: path.write_bytes(path.read_bytes() + b"\n0"),
}


@contextlib.contextmanager
def within(seconds):
    """Fail if the context takes longer, as the reader of a named pipe would."""

    def stop(*_):
        pytest.fail(f"it takes more than {seconds} s")  # no `except Exception` catches this

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fresh(template, folder):
    """Copy a template to a folder, replacing what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
