"""The command `ncjax`: data on stdout, one line for each error, exit codes."""

import io
import json
import os
import re
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import subprocesses

import ncjax
from ncjax import command

K, N, D = 3, 30, 5
RNG = np.random.default_rng(0)
LABELS = np.arange(N) % K
W = np.pad(np.eye(K) - 1 / K, ((0, 0), (0, D - K)))
FEATURES = W[LABELS] + 0.01 * RNG.normal(size=(N, D))
GOOD = {"features": FEATURES, "labels": LABELS, "W": W, "b": np.zeros(K)}
NAMES = ncjax.CollapseMetrics._fields

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    assert jax.config.jax_enable_x64

    def call(*argv):
        code = command.main(argv)
        return code, *capsys.readouterr()

    yield call
    assert jax.config.jax_enable_x64


def refused(result):
    """Return the only line of an error of bad use."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    return err.removeprefix("error: ").rstrip("\n")


# measure


def test_measure_prints_the_table_of_analyze(run):
    np.savez("x.npz", **GOOD)
    code, out, err = run("measure", "x.npz", "--float64")
    assert (code, err) == (0, "")
    assert out == f"{ncjax.analyze(**GOOD)}\n"


def test_measure_prints_the_metrics_as_json(run):
    np.savez("x.npz", **GOOD)
    _, out, _ = run("measure", "x.npz", "--float64", "--json")
    found = json.loads(out)
    expected = ncjax.collapse_metrics_from_features(**GOOD)
    for name in NAMES:
        assert found[name] == pytest.approx(float(getattr(expected, name)), rel=1e-9)
    assert found["verdict"].startswith("Collapsed: ")
    assert found["notes"] == []


def test_measure_computes_in_float32_by_default(run):
    np.savez("x.npz", **GOOD)
    _, out, _ = run("measure", "x.npz", "--json")
    found = json.loads(out)["within_class_quotient"]
    assert found == np.float32(found)


def test_measure_reads_a_folder_and_single_files(run, tmp_path):
    np.savez("x.npz", **GOOD)
    folder = tmp_path / "arrays"
    folder.mkdir()
    for name, array in GOOD.items():
        np.save(folder / f"{name}.npy", array)
    flags = [f"--{name}={folder / name}.npy" for name in GOOD]
    outputs = [run("measure", *where)[1] for where in (["x.npz"], [str(folder)], flags)]
    assert len(set(outputs)) == 1


def test_files_of_one_array_are_memory_mapped(tmp_path):
    np.save(tmp_path / "features.npy", FEATURES)
    found = command.arrays.from_path(str(tmp_path))
    assert isinstance(found["features"], np.memmap)


def test_measure_without_W_says_so_and_prints_null_as_json(run):
    np.savez("x.npz", features=FEATURES, labels=LABELS)
    code, out, err = run("measure", "x.npz", "--json")
    assert code == 0
    assert err == "x.npz: no W, so only the features are measured\n"
    found = json.loads(out)
    assert found["self_duality"] is None
    assert found["cdnv"] > 0


def test_measure_leaves_rare_classes_out_on_request(run):
    labels = LABELS.copy()
    labels[labels == 2] = 1
    labels[0] = 2
    np.savez("x.npz", **GOOD | {"labels": labels})
    _, out, _ = run("measure", "x.npz", "--min-count=2")
    assert "2 of 3 classes have at least 2 samples, and are measured." in out


def test_a_figure_is_written_once(run, tmp_path):
    np.savez("x.npz", **GOOD)
    code, _, err = run("measure", "x.npz", "--plot=x.png")
    assert (code, err) == (0, "figure: x.png\n")
    written = (tmp_path / "x.png").read_bytes()
    assert written.startswith(b"\x89PNG")
    message = refused(run("measure", "x.npz", "--plot=x.png"))
    assert message == "--plot=x.png: the file exists; add --overwrite to replace it"
    assert (tmp_path / "x.png").read_bytes() == written
    assert run("measure", "x.npz", "--plot=x.png", "--overwrite")[0] == 0


def test_measure_adds_the_numbers_of_a_convention(run):
    np.savez("x.npz", **GOOD)
    _, out, _ = run("measure", "x.npz", "--float64", "--convention=zhu2021", "--json")
    found = json.loads(out)
    expected = ncjax.conventions.measure("zhu2021", **GOOD)
    for name, value in expected.items():
        assert found[f"zhu2021/{name}"] == pytest.approx(value, rel=1e-9)
    message = refused(run("measure", "x.npz", "--convention=zhu"))
    assert message.startswith("x.npz: convention must be one of ")


def test_measure_prints_a_row_for_each_layer_in_the_order_of_the_file(run, tmp_path):
    first, second = FEATURES + RNG.normal(size=(N, D)), FEATURES
    layers = {"z": first, "a": second}
    np.savez("x.npz", labels=LABELS, **{f"features/{k}": v for k, v in layers.items()})
    np.savez("y.npz", labels=LABELS, W=W, **layers)
    code, out, err = run("measure", "x.npz", "--layers", "--float64", "--plot=x.png")
    assert (code, err) == (0, "figure: x.png\n")
    assert (tmp_path / "x.png").exists()
    assert run("measure", "y.npz", "--layers", "--float64")[1] == out
    rows = [line.split() for line in out.splitlines()[1:3]]
    expected = ncjax.layerwise(layers, LABELS)
    assert [row[0] for row in rows] == ["z", "a"]
    quotients = [float(row[2]) for row in rows]
    np.testing.assert_allclose(quotients, expected.metrics.within_class_quotient, 1e-3)
    assert f"a factor of {float(expected.law.decay_ratio):.3g} per layer" in out
    found = json.loads(run("measure", "x.npz", "--layers", "--float64", "--json")[1])
    assert found.keys() == expected.as_dict().keys()
    np.savez("x.npz", labels=LABELS)
    message = refused(run("measure", "x.npz", "--layers"))
    assert message.startswith("x.npz: --layers needs arrays features/NAME, got labels; ")


def test_one_layer_has_neither_law_nor_tunnel(run):
    np.savez("x.npz", labels=LABELS, h=FEATURES)
    code, out, _ = run("measure", "x.npz", "--layers", "--float64", "--plot=x.png")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["layer", "h"]


# Bad input

MESSAGES = [
    ({"labels": None}, "x.npz: no array 'labels', only features, W, b; write np.savez("),
    ({"features": None}, "x.npz: no array 'features', only labels, W, b; write"),
    ({"labels": LABELS * 1.0}, "x.npz: expected labels of integers (30,), got float64"),
    ({"labels": LABELS.astype(object)}, "x.npz: labels holds Python objects, which ncjax"),
    ({"labels": LABELS[:9]}, "(9,): pass one label for each row of features"),
    ({"labels": LABELS + 1}, "x.npz: labels must lie in [0, 3), got 1 to 3: number"),
    ({"features": FEATURES * np.nan}, "x.npz: features must be finite, got NaN or infin"),
    ({"features": FEATURES.T}, "x.npz: expected labels of integers (5,), got int64 (30,)"),
    ({"features": LABELS[:, None]}, "x.npz: features must be floating, got int64: cast"),
    ({"features": FEATURES.view("V2")}, "features has the dtype |V2, raw bytes, as np.sav"),
    (
        {"W": W.T},
        "x.npz: expected features (N, d) and W (K, d), got (30, 5) and (5, 3): tr",
    ),
    ({"b": np.zeros(4)}, "x.npz: expected b (3,), got (4,): pass one entry for each row"),
]


@pytest.mark.parametrize(("changes", "expected"), MESSAGES)
def test_arrays_that_do_not_fit_are_refused_in_one_line(run, changes, expected):
    arrays = {name: array for name, array in (GOOD | changes).items() if array is not None}
    np.savez("x.npz", **arrays)
    assert expected in refused(run("measure", "x.npz"))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("other.npz", b"", "x.npz does not exist; . has other.npz"),
        ("other.txt", b"", "x.npz does not exist; . has no .npz or .npy file"),
        ("x.npz", b"text", "x.npz is neither .npz nor .npy; write np.savez('features.npz'"),
        (
            "x.npz",
            b"PK\3\4 and no more",
            "x.npz is damaged: its end is missing; write it anew",
        ),
    ],
)
def test_files_that_cannot_be_read_are_refused(run, tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert refused(run("measure", "x.npz")).startswith(expected)


def test_other_kinds_of_files_are_named(run, tmp_path):
    np.save("x.npy", W)
    assert refused(run("measure", "x.npy")).startswith("x.npy holds one array; pass --fea")
    (tmp_path / "empty").mkdir()
    assert refused(run("measure", "empty")).startswith("empty: a folder without .npy files")
    np.savez("x.npz", **{"archive/data.pkl": W})
    assert "PyTorch" in refused(run("measure", "x.npz"))
    message = refused(run("measure", "--features=x.npz", "--labels=x.npy"))
    assert message == "x.npz is no .npy file; write it by np.save('x.npz', array)"


def test_nothing_is_unpickled(run, tmp_path):
    """A file that would make a folder when unpickled."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    np.savez("x.npz", **GOOD | {"labels": np.array([Bomb()], object)})
    refused(run("measure", "x.npz"))
    np.save("y.npy", np.array([Bomb()], object), allow_pickle=True)
    refused(run("measure", "--features=y.npy", "--labels=y.npy"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            [],
            "expected a command, one of measure, compare, certify, flow; see ncjax --help",
        ),
        (["mesure"], "unknown command 'mesure'; did you mean measure? expected one of"),
        (["measure"], "expected DATA, or --features=FILE --labels=FILE; see --help"),
        (["measure", "--jsn"], "unknown argument '--jsn'; did you mean --json? see ncjax"),
        (["measure", "a", "b"], "unknown argument 'b'; see ncjax measure --help"),
        (["measure", "a", "--W=w.npy"], "got DATA and --W; give one .npz or folder, or"),
        (["measure", "a", "--min-count=0"], "--min-count: expected an integer of at least"),
        (["measure", "a", "--plot=a.txt"], "--plot=a.txt: expected a file name that ends"),
        (["measure", "a", "--plot=b/a.png"], "--plot=b/a.png: there is no folder b; make"),
        (["compare", "a"], "the following arguments are required: DATA; see ncjax compare"),
        (["certify", "a", "--tol=x"], "--tol: expected a number that is not negative, got"),
        (["certify", "a", "--multipliers=x"], "--multipliers: invalid choice: 'x' (choose"),
        (["flow", "--log-t-max=1"], "--log-t-max: expected a number above 1, got '1'; see"),
        (["measure", "--W=w.npy"], "expected --features=FILE too, or DATA; see --help"),
        (["measure", "-"], "- is a pipe, which ncjax cannot read; save the arrays in"),
        (["measure", "a", "--layers", "--convention=zhu2021"], "--convention is for the l"),
        (["flow", f"--seed={2**63}"], "--seed: expected an integer of at most 9223372036"),
        (["flow", "--per-class=1000000000000"], "this flow needs at least "),
        (["flow", "--num-classes=1"], "--num-classes: expected an integer of at least 2"),
    ],
)
def test_bad_use_is_one_line(run, argv, expected):
    assert refused(run(*argv)).startswith(expected)


def test_a_closed_stream_is_no_error(tmp_path):
    for closed in (">&-", "2>&-"):
        line = f"exec {sys.executable} -m ncjax measure x.npz {closed}"
        done = subprocesses.run(["sh", "-c", line], cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "Traceback" not in done.stderr


def test_an_error_that_nobody_foresaw_has_its_type_and_on_request_its_trace(
    run, monkeypatch
):
    np.savez("x.npz", **GOOD)

    def broken(*_args, **_settings):
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr("ncjax.command.measure.analyze", broken)
    expected = "error: ZeroDivisionError: first (--traceback shows where)\n"
    assert run("measure", "x.npz") == (1, "", expected)
    code, _, err = run("measure", "x.npz", "--traceback")
    assert code == 1
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith(expected)


def test_an_interruption_and_a_closed_pipe_have_the_codes_of_a_shell(run, monkeypatch):
    np.savez("x.npz", **GOOD)

    def interrupted(*_args, **_settings):
        raise KeyboardInterrupt

    def closed(*_args, **_settings):
        raise BrokenPipeError

    monkeypatch.setattr("ncjax.command.measure.analyze", interrupted)
    assert run("measure", "x.npz") == (128 + signal.SIGINT, "", "interrupted\n")
    monkeypatch.setattr("ncjax.command.measure.analyze", closed)
    assert run("measure", "x.npz") == (128 + signal.SIGPIPE, "", "")


def test_the_process_ends_with_the_code_and_without_a_traceback(tmp_path):
    missing = [sys.executable, "-m", "ncjax", "measure", "x.npz"]
    done = subprocesses.run(missing, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: x.npz does not exist; . has no .npz or .npy file\n"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocesses.run_to([sys.executable, "-m", "ncjax", "--version"], writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_progress_is_shown_on_a_terminal_alone(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, expected in ((Terminal(), "\rreading:  50%\r\x1b[K"), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr("ncjax.command.output._QUIET_SECONDS", -1)
        progress = command.output.Progress("reading")
        progress(1, 2)
        progress(2, 2)
        assert stream.getvalue() == expected


# compare, certify, flow


def test_compare_prints_both_and_their_change(run):
    np.savez("a.npz", **GOOD)
    np.savez("b.npz", **GOOD | {"features": W[LABELS] + 3 * (FEATURES - W[LABELS])})
    code, out, err = run("compare", "a.npz", "b.npz", "--float64")
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:-2]}
    first, second, *change = rows["within_class_quotient"]
    assert change[0] == "x"
    assert float(change[1]) == pytest.approx(float(second) / float(first), rel=1e-2)
    assert rows["accuracy"] == ["1", "1", "+0"]
    assert out.splitlines()[-1].startswith(
        "b.npz is farther from collapse than a.npz: its "
    )
    found = json.loads(run("compare", "b.npz", "a.npz", "--float64", "--json")[1])
    quotients = [found[n]["within_class_quotient"] for n in ("first", "second")]
    assert found["change"]["within_class_quotient"] == quotients[1] / quotients[0]
    assert found["verdict"].startswith("a.npz is nearer to collapse than b.npz: its ")
    same = json.loads(run("compare", "a.npz", "a.npz", "--json")[1])
    assert same["verdict"].startswith("a.npz is as near to collapse as a.npz: its ")


def test_certify_gives_the_verdict_of_the_certificate(run):
    solution = ncjax.solve_separation((2,) * K, D).params
    np.savez("optimum.npz", W=solution.W, H=solution.H)
    code, out, err = run("certify", "optimum.npz", "--tol=1e-6")
    assert (code, err) == (0, "")
    assert "Globally optimal direction (multipliers: nnls)." in out
    found = json.loads(run("certify", "optimum.npz", "--tol=1e-6", "--json")[1])
    assert found["margin_ratio"] == pytest.approx(1, rel=1e-9)
    assert found["sigma_max"] == pytest.approx(1, rel=1e-6)
    saddle = ncjax.block_saddle(2, 2, 1, 4)
    np.savez("saddle.npz", W=saddle.W, H=saddle.H)
    found = json.loads(run("certify", "saddle.npz", "--tol=1e-6", "--json")[1])
    assert found["verdict"] == "strict saddle direction"


def test_certify_takes_the_first_features_of_each_class(run):
    order = np.argsort(LABELS, kind="stable").reshape(K, -1)[:, :2]
    np.savez("x.npz", features=FEATURES, labels=LABELS, W=W)
    np.savez("wh.npz", W=W, H=FEATURES[order])
    found = run("certify", "x.npz", "--per-class=2", "--multipliers=softmax")
    assert found == run("certify", "wh.npz", "--multipliers=softmax")
    assert found[0] == 0


def test_certify_refuses_points_that_do_not_fit(run):
    np.savez("x.npz", W=W, H=-W[:, None])
    assert "x.npz: every margin must be positive" in refused(run("certify", "x.npz"))
    np.savez("x.npz", W=W, H=W)
    message = refused(run("certify", "x.npz"))
    assert "expected W (K, d) and H (K, n, d), got W (3, 5) and H (3, 5)" in message
    np.savez("x.npz", W=W)
    message = refused(run("certify", "x.npz"))
    assert message == "x.npz: expected W and H, or features, labels and W; got W"


@pytest.mark.slow  # the page of the command runs a flow too
def test_flow_tends_to_collapse(run, tmp_path):
    size = ("--num-classes=3", "--per-class=2", "--dim=3", "--seeds=2")
    command_line = ("flow", *size, "--log-t-max=30", "--json", "--plot=flow.pdf")
    code, out, err = run(*command_line)
    assert (code, err) == (0, "figure: flow.pdf\n")
    assert (tmp_path / "flow.pdf").read_bytes().startswith(b"%PDF")
    found = json.loads(out)
    assert found["settings"]["log_t_max"] == found["log_times"][-1] == 30
    start = jax.vmap(lambda key: ncjax.init_params(key, 3, 2, 3, 0.1, "float64"))(
        jax.random.split(jax.random.key(0), 2)
    )
    ends = [
        ncjax.gradient_flow(ncjax.Params(*(leaf[i] for leaf in start)), [30.0]).final
        for i in range(2)
    ]
    expected = [float(ncjax.collapse_metrics(end).self_duality) for end in ends]
    assert found["final"]["self_duality"] == pytest.approx(np.median(expected), rel=1e-4)
    column = found["median"]["within_class_quotient"]
    assert len(column) == len(found["log_times"])


# The page


def assert_same_text(found, expected):
    """Assert that two texts are equal but for their numbers, which are nearly equal."""
    words = [text.split() for text in (found, expected)]
    assert [len(line) for line in words] == [len(words[0])] * 2, found
    for got, right in zip(*words, strict=True):
        numbers = [re.fullmatch(r"-?[\d.]+(e[-+]\d+)?", word) for word in (got, right)]
        if all(numbers):
            assert float(got) == pytest.approx(float(right), rel=0.06, abs=1e-6), found
        else:
            assert got == right, found


def test_the_page_shows_what_the_command_prints(run):
    page = Path(__file__).parents[1] / "docs" / "howto" / "command.md"
    blocks = re.findall(
        r"^```(python|console)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
    )
    names: dict = {}
    shown = 0
    for kind, block in blocks:
        if kind == "console":
            line, _, expected = block.partition("\n")
            assert line.startswith("$ ncjax ")
            code, out, err = run(*line.split()[2:])
            assert (code, err) == (0, "")
            assert_same_text(out, expected)
            shown += 1
        elif "savez" in block:
            exec(block, names)
    assert shown == 4
