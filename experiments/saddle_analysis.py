"""Tell saddles from optima among the critical directions, and measure the escapes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ncjax
from experiments import _fits, _legs, _saddles
from experiments._runs import cli, files, folders, page, precision
from experiments._runs.errors import BadUse
from experiments._runs.progress import tqdm
from ncjax import plotting
from ncjax.peeled.separation import GLOBAL_OPTIMUM, NO_ROOM, STRICT_SADDLE

NAME = "saddle_analysis"
OUTPUTS = (
    *("family.csv", "family.md", "directions.csv", "escape.csv", "escape.md"),
    *("descent.csv", "saddles.png", "saddles.pdf"),
)
ESCAPES = (
    _saddles.Block(2, 2, 1, 4),
    _saddles.Block(3, 2, 1, 6),
    _saddles.Block(2, 3, 1, 6),
)
STOPS = np.array([3.0, 10.0, 30.0, 100.0, 300.0, 1000.0])
ANGLES = np.linspace(0.0, 0.5, 51)
DESCENT_SCALE = 1.5
FIT_WINDOW = (1e3, 1e4)


@dataclasses.dataclass(frozen=True)
class Config(cli.Settings):
    """Compute curvature, certificates and escapes at the critical directions of the flow.

    Example: python -m experiments.saddle_analysis --max_classes=12
    """

    max_classes: int = cli.flag(12, "largest K of the block family", cli.MODEL)
    scale: float = cli.flag(30.0, "c, scale of the saddles, Z = c (W, H)", cli.MODEL)
    seeds: int = cli.flag(
        16, "flows from random starts, analysed at several times", cli.SEEDS
    )
    seed: int = cli.flag(0, "seed of all random starts", cli.SEEDS)
    num_classes: int = cli.flag(4, "K, number of classes of the random starts", cli.MODEL)
    per_class: int = cli.flag(2, "n, samples of each class of the random starts", cli.MODEL)
    dim: int = cli.flag(6, "d, feature dimension of the random starts", cli.MODEL)
    workdir: str = cli.path_flag(
        "", f"run folder; if empty, a new one under runs/{NAME}", cli.FOLDER
    )
    overwrite: bool = cli.flag(False, "replace the run that workdir holds", cli.FOLDER)


def run(config: Config) -> Path:
    """Run the experiment and return its folder.

    Write family, directions, escape and descent as .csv, family and escape also as .md,
    summary.json, saddles.png and saddles.pdf. This needs `jax_enable_x64`.

    Raises:
      BadUse: a setting is out of range or the folder cannot be used.
      OSError: a file cannot be written.
    """
    _check(config)
    with folders.open_config(config, NAME, OUTPUTS) as (folder, _):
        _run(config, folder)
    return folder


def _run(config: Config, folder: Path) -> None:
    """Do the run in its folder."""
    with tqdm(_saddles.family(config.max_classes), desc="block family") as blocks:
        family = [family_row(block, config.scale) for block in blocks]
    files.write_table(folder / "family", family)
    directions = _directions(config)
    files.write_csv(folder / "directions.csv", STOPS, directions)
    with tqdm(ESCAPES, desc="escape") as blocks:
        escapes = [_escape(block, config) for block in blocks]
    files.write_table(folder / "escape", [row for row, _ in escapes])
    with tqdm(ESCAPES, desc="descent") as blocks:
        descents = [_descent(block) for block in blocks]
    _write_descent(folder / "descent.csv", descents)
    figure = _figure(directions, escapes, descents)
    files.write_files(folder / "saddles", plotting.render(figure))
    summary = _summarise(family, directions, [row for row, _ in escapes], descents)
    folders.write_summary(folder, summary | folders.provenance(), OUTPUTS)
    print(_report(summary))


def _check(config: Config) -> None:
    """Raise BadUse if a setting is out of range, before any work."""
    precision.check_float64()
    minimums = {"max_classes": 2, "num_classes": 2, "seeds": 1, "per_class": 1, "dim": 1}
    for name, bound in minimums.items():
        if getattr(config, name) < bound:
            raise BadUse(f"--{name} must be at least {bound}, got {getattr(config, name)}")
    if not (math.isfinite(config.scale) and config.scale > 0):
        raise BadUse(f"--scale must be positive and finite, got {config.scale}")
    if not 0 <= config.seed < 2**63:
        raise BadUse(f"--seed must lie in [0, 2**63), got {config.seed}")
    sizes = (config.num_classes, config.per_class, config.dim)
    _legs.check_memory(config.seeds, *sizes, STOPS.size)


def family_row(block: _saddles.Block, scale: float) -> dict[str, Any]:
    """Compare prediction and computation at one member of the block family."""
    params = block.params(scale)
    eig = ncjax.hessian_eig(
        ncjax.log_cross_entropy, params, k=block.multiplicity + 1, sphere=True
    )
    plain = ncjax.hessian_eig(_saddles.relative_loss, params)
    certificate = ncjax.certificate(params)
    values, target = np.asarray(eig.eigenvalues), block.eigenvalue(scale)
    is_saddle = block.num_blocks > 1
    matches = np.abs(values - target) < 1e-9 if is_saddle else values < -1e-9
    return block._asdict() | {
        "num_classes": block.num_classes,
        "predicted_eigenvalue": target,
        "computed_eigenvalue": float(values[0]),
        "predicted_multiplicity": block.multiplicity,
        "computed_multiplicity": int(matches.sum()),
        "plain_eigenvalue": float(plain.eigenvalues[0]),
        "predicted_sigma_max": block.sigma_max,
        "computed_sigma_max": float(certificate.sigma_max),
        "verdict": ncjax.VERDICTS[int(certificate.verdict)],
    }


def _directions(config: Config) -> dict[str, np.ndarray]:
    """Return columns (S, T) along flows from random starts, at the times `STOPS`."""
    keys = jax.random.split(jax.random.key(config.seed), config.seeds)

    def one(key):
        start = ncjax.init_params(key, config.num_classes, config.per_class, config.dim)
        flow = ncjax.gradient_flow(start, STOPS, rtol=1e-10, atol=1e-10)
        return jax.vmap(at_one_time)(flow.params)

    def at_one_time(state):
        eig = ncjax.hessian_eig(ncjax.log_cross_entropy, state, sphere=True)
        certificate = ncjax.certificate(state)
        return {
            "kkt_angle": ncjax.kkt_angle(state),
            "stationarity": ncjax.kkt(state).stationarity,
            "sigma_max": certificate.sigma_max,
            "duality_gap": certificate.gap,
            "verdict": certificate.verdict,
            "eigenvalue": eig.eigenvalues[0],
        }

    return jax.device_get(jax.jit(jax.vmap(one))(keys))


def _escape(block: _saddles.Block, config: Config):
    """Compare fitted and predicted growth off one saddle; return the flows too."""
    log_times = np.geomspace(10, FIT_WINDOW[1], 40)
    flows = _saddles.escape(
        block, log_times, distance=1e-6, seeds=4, key=jax.random.key(config.seed)
    )
    fitted = -_fits.exponents(log_times, flows.unstable, FIT_WINDOW)
    row = block._asdict() | {
        "predicted_exponent": block.escape_exponent,
        "fitted_exponent": float(np.median(fitted)),
        "largest_error": float(np.abs(fitted - block.escape_exponent).max()),
    }
    return row, flows


def _descent(block: _saddles.Block) -> dict[str, Any]:
    """Return the loss along the certified descent on the sphere, and its parabola.

    The norm is moderate because the parabola holds for angles up to its inverse.
    """
    params = block.params(DESCENT_SCALE)
    direction = ncjax.certificate(params).direction
    size = math.sqrt(ncjax.squared_norm(params))
    length = math.sqrt(ncjax.squared_norm(direction))

    def at(angle):
        rotated = jax.tree.map(
            lambda z, x: jnp.cos(angle) * z + jnp.sin(angle) * size / length * x,
            params,
            direction,
        )
        return ncjax.log_cross_entropy(rotated)

    change = jax.vmap(at)(jnp.asarray(ANGLES)) - at(0.0)
    return {
        "block": block,
        "computed": np.asarray(change) / size**2,
        "predicted": block.eigenvalue(DESCENT_SCALE) * ANGLES**2 / 2,
    }


def _write_descent(path: Path, descents: Sequence[Mapping[str, Any]]) -> None:
    """Write one row per saddle and angle."""
    rows = [
        entry["block"]._asdict()
        | {"angle": angle, "log_loss_change": computed, "parabola": predicted}
        for entry in descents
        for angle, computed, predicted in zip(
            ANGLES, entry["computed"], entry["predicted"], strict=True
        )
    ]
    files.write_rows(path, rows)


def _figure(directions, escapes, descents):
    """Draw verdicts along the flow, escapes and descents."""
    return plotting.saddle_figure(
        log_times=STOPS,
        stationarity=directions["stationarity"],
        excess=np.abs(directions["sigma_max"] - 1),
        escapes=[
            (_label(row), flows.log_times, flows.unstable, row["predicted_exponent"])
            for row, flows in escapes
        ],
        angles=ANGLES,
        descents=[
            (_label(d["block"]._asdict()), d["computed"], d["predicted"]) for d in descents
        ],
    )


def _label(block: Mapping[str, Any]) -> str:
    return f"{block['num_blocks']} blocks of {block['block_size']}"


def _summarise(family, directions, escapes, descents) -> dict[str, Any]:
    """Return the content of summary.json."""
    # If `dim` is too small for the predicted direction, there is nothing to compare.
    comparable = [r for r in family if r["num_blocks"] == 1 or r["predicted_multiplicity"]]
    error = [
        min(r["computed_eigenvalue"], 0) - r["predicted_eigenvalue"] for r in comparable
    ]
    sigma = [r["computed_sigma_max"] - r["predicted_sigma_max"] for r in family]
    wrong = [
        r
        for r in family
        if r["computed_multiplicity"] != r["predicted_multiplicity"]
        or r["verdict"] != ncjax.VERDICTS[_expected(r)]
    ]
    final = directions["verdict"][:, -1]
    return {
        "family": {
            "members": len(family),
            "largest_eigenvalue_error": float(np.abs(error).max()),
            "largest_sigma_max_error": float(np.abs(sigma).max()),
            "wrong_multiplicity_or_verdict": wrong,
            "collapsed": sum(r["num_blocks"] == 1 for r in family),
            "collapsed_with_negative_plain_hessian": sum(
                r["num_blocks"] == 1 and r["plain_eigenvalue"] < -1e-3 for r in family
            ),
        },
        "directions": {
            "log_t": float(STOPS[-1]),
            "seeds": len(final),
            "globally_optimal": int(np.sum(final == GLOBAL_OPTIMUM)),
            "stationarity": _fits.spread(directions["stationarity"][:, -1]),
            "sigma_max": _fits.spread(directions["sigma_max"][:, -1]),
            "eigenvalue": _fits.spread(directions["eigenvalue"][:, -1]),
        },
        "escape": escapes,
        "descent": [
            entry["block"]._asdict()
            | {
                "curvature": float(2 * entry["computed"][1] / ANGLES[1] ** 2),
                "predicted": entry["block"].eigenvalue(DESCENT_SCALE),
            }
            for entry in descents
        ],
    }


def _expected(row: Mapping[str, Any]) -> int:
    if row["num_blocks"] == 1:
        return GLOBAL_OPTIMUM
    return STRICT_SADDLE if row["predicted_multiplicity"] else NO_ROOM


def _report(summary: Mapping[str, Any]) -> str:
    """Return the printed verdicts."""
    family, flow = summary["family"], summary["directions"]
    lines = [
        f"block family, {family['members']} members: eigenvalues off by at most "
        f"{family['largest_eigenvalue_error']:.1e}, sigma_max by "
        f"{family['largest_sigma_max_error']:.1e}; wrong multiplicities or verdicts: "
        f"{len(family['wrong_multiplicity_or_verdict'])}",
        "plain Hessian of L: negative eigenvalues at "
        f"{family['collapsed_with_negative_plain_hessian']} of {family['collapsed']} "
        "collapsed points too, so it cannot tell",
        f"{flow['seeds']} flows at log t = {flow['log_t']:g}: {flow['globally_optimal']} "
        f"certified optimal, sigma_max {flow['sigma_max']['median']:.6f}",
    ]
    lines += [
        f"escape, {_label(row)}: (log t)^{row['fitted_exponent']:.4f}, predicted "
        f"{row['predicted_exponent']:.4f}"
        for row in summary["escape"]
    ]
    lines += [
        f"descent, {_label(row)}: curvature {row['curvature']:.6f}, predicted "
        f"{row['predicted']:.6f}"
        for row in summary["descent"]
    ]
    return "\n".join(lines)


def _findings(summary: Mapping[str, Any]) -> page.Findings:
    """Report the block family, certificates of flows, escapes and descents."""
    family, flow = summary["family"], summary["directions"]
    wrong, optimal = family["wrong_multiplicity_or_verdict"], flow["globally_optimal"]
    sound = not wrong and optimal == flow["seeds"]
    verdict = (
        f"{family['members']} members, {len(wrong)} wrong; {optimal} of {flow['seeds']} "
        "flows certified optimal"
    )
    tables = [
        _counts(family, flow),
        _found_and_predicted(
            "Escape off a saddle: exponent of log t",
            summary["escape"],
            ("fitted_exponent", "predicted_exponent"),
        ),
        _found_and_predicted(
            "Descent on the sphere: curvature",
            summary["descent"],
            ("curvature", "predicted"),
        ),
    ]
    return page.Findings(page.GOOD if sound else page.BAD, verdict, tables)


def _counts(family: Mapping[str, Any], flow: Mapping[str, Any]) -> page.Table:
    """Return the errors at the block family and the certificates of the flows."""
    rows = [
        ["members of the block family", page.number(family["members"])],
        ["largest error of an eigenvalue", page.number(family["largest_eigenvalue_error"])],
        ["largest error of σ_max", page.number(family["largest_sigma_max_error"])],
        [
            "wrong multiplicities or verdicts",
            page.number(len(family["wrong_multiplicity_or_verdict"])),
        ],
        [
            "collapsed points where the plain Hessian has negative eigenvalues too",
            f"{family['collapsed_with_negative_plain_hessian']} of {family['collapsed']}",
        ],
        [
            f"flows certified optimal at log t = {page.number(flow['log_t'])}",
            f"{flow['globally_optimal']} of {flow['seeds']}",
        ],
        ["their σ_max, median", page.number(flow["sigma_max"]["median"])],
        ["their KKT residual, median", page.number(flow["stationarity"]["median"])],
    ]
    return page.Table("Closed forms against computation", ["quantity", "value"], rows)


def _found_and_predicted(
    caption: str, rows: Sequence[Mapping[str, Any]], columns: tuple[str, str]
) -> page.Table:
    """Return a row for each saddle."""
    cells = [
        [
            f"{_label(row)} classes, n = {row['per_class']}, d = {row['dim']}",
            *(page.number(row[column]) for column in columns),
        ]
        for row in rows
    ]
    return page.Table(caption, ["saddle", "found", "predicted"], cells)


PAGE = page.Page(
    title="Saddles, certificates, escapes",
    figures={
        "saddles.png": "(a) certificates along flows from random starts, (b) escapes from "
        "saddles, (c) the loss along the certified direction of descent. Dotted: predicted."
    },
    show=_findings,
)


if __name__ == "__main__":
    cli.main(Config, run, f"experiments.{NAME}")
