"""Several processes: they start alike, share the seeds, and end together."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import subprocesses

from experiments import _record, _seeds, _training, train_resnet, ulpm_flow
from experiments._runs import group, links, processes
from experiments._runs.errors import BadUse, RunFailed
from ncjax.networks import data

HOST = "127.0.0.1"
SLOW = pytest.mark.slow


made = []


@pytest.fixture(autouse=True)
def closed():
    """Close all connections after a test."""
    yield
    while made:
        one = made.pop()
        dies(one)
        one._lost.set()
        for link in one._links.values():
            link.close()


def groups(size, timeout=10.0):
    """Return the groups of all processes of a run, none of which has met the others."""
    port = links.free_port(HOST)
    several = [
        group.Several(
            group.Place(HOST, port, size, number, timeout),
            lambda number=number: f"resume with: command {number}",
        )
        for number in range(size)
    ]
    made.extend(several)
    return several


def together(calls):
    """Return the results of functions called at once, or the errors that they raise."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.exception() or future.result() for future in futures]


def met(size, timeout=10.0):
    """Return groups that have met."""
    several = groups(size, timeout)
    ports = together([lambda one=one: one.meet({}, "") for one in several])
    assert len({*ports}) == 1, ports
    return several


@pytest.fixture
def ends(monkeypatch):
    """Record what processes print and how they exit, in place of their end."""
    found, written = [], {}

    def write(_stream, text):
        written[threading.get_ident()] = text.decode()

    def leave(code):
        found.append((written[threading.get_ident()], code))

    monkeypatch.setattr(group, "_GRACE_SECONDS", 0.2)
    monkeypatch.setattr(group, "os", SimpleNamespace(write=write, _exit=leave))
    return found


def wait_for(found, count):
    """Wait until a list has so many entries."""
    deadline = time.monotonic() + 10
    while len(found) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(found) == count, found
    return sorted(found)


def test_processes_exchange_bytes_of_any_length():
    several = met(4)
    contents = [b"", b"1", b"2" * 3_000_000, bytes(range(256))]
    calls = [
        lambda one=one, content=content: (one.exchange(content), one.exchange(b"end"))
        for one, content in zip(several, contents, strict=True)
    ]
    assert together(calls) == [(contents, [b"end"] * 4)] * 4
    assert together([one.leave for one in several]) == [None] * 4


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"--rate": 0.2}, "--rate is 0.1 in process 0 and 0.2 in process 1: give one"),
        (
            {"--rate": 0.2, "--seed": 3},
            "--rate is 0.1 in process 0 and 0.2 in process 1, "
            "--seed is 0 in process 0 and 3 in process 1: give one",
        ),
        ({"--on": 1}, "--on is True in process 0 and 1 in process 1: give one"),
        ({"--new": ""}, "--new is None in process 0 and '' in process 1: give one"),
        (
            {group.EXPERIMENT: "b", "--new": 1},
            "the experiment is 'a' in process 0 and 'b' in process 1: give one",
        ),
    ],
)
def test_other_values_are_refused_by_every_process_in_the_same_words(other, message):
    values = {group.EXPERIMENT: "a", "--rate": 0.1, "--seed": 0, "--on": True}
    given = [values, values | other, values]
    calls = [
        lambda one=one, mine=mine: one.meet(mine, "give one")
        for one, mine in zip(groups(3), given, strict=True)
    ]
    errors = together(calls)
    assert {type(error) for error in errors} == {BadUse}
    assert {str(error) for error in errors} == {message}


def test_another_number_of_processes_is_found_without_waiting_for_them(monkeypatch):
    monkeypatch.setattr(group, "_STRANGER_SECONDS", 0.3)
    first, second, _ = groups(3, timeout=60.0)
    calls = [
        lambda: first.meet({"--num_processes": 3}, "give one"),
        lambda: second.meet({"--num_processes": 2}, "give one"),
    ]
    start = time.monotonic()
    for error in together(calls):
        assert str(error).startswith("--num_processes is 3 in process 0 and 2 in process 1")
    assert time.monotonic() - start < 10


def test_two_processes_of_one_number_are_refused():
    first, second, third = groups(3)
    third.place = second.place
    errors = together([lambda one=one: one.meet({}, "") for one in (first, second, third)])
    assert {str(error) for error in errors} == {"two processes have --process_id=1"}


@pytest.mark.parametrize("absent", [0, 2])
def test_a_process_that_does_not_start_ends_the_others_in_time(absent):
    several = groups(3, timeout=0.5)
    del several[absent]
    start = time.monotonic()
    errors = together([lambda one=one: one.meet({}, "") for one in several])
    assert time.monotonic() - start < 5
    for one, error in zip(several, errors, strict=True):
        assert type(error) is RunFailed
        if absent:
            assert str(error).startswith("process 2 of 3 did not start within 0.5 s")
        else:
            assert str(error).startswith("process 0 did not answer at --coordinator=")
        assert str(error).endswith(f"; resume with: command {one.place.number}")


def test_a_stranger_on_the_port_is_ignored():
    first, second = groups(2)
    with ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(first.meet, {}, "")
        nested, infinite = b"[" * 2**19, b'{"process": Infinity, "values": {}}'
        framed = [b"p" + len(x).to_bytes(8, "big") + x for x in (nested, infinite)]
        html, long = b"GET / HTTP/1.1\r\n\r\n", b"p" + b"\xff" * 8
        for greeting in (html, b"", long, *framed):
            deadline = time.monotonic() + 5
            with links.connect(HOST, first.place.port, deadline) as stranger:
                stranger.sendall(greeting)
        assert second.meet({}, "") == meeting.result()


def test_a_stranger_that_sends_byte_by_byte_delays_the_start_by_a_moment(monkeypatch):
    monkeypatch.setattr(group, "_STRANGER_SECONDS", 0.3)
    first, second = groups(2)
    start = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(first.meet, {}, "")
        stranger = links.connect(HOST, first.place.port, start + 5)
        with stranger, contextlib.suppress(OSError):  # it is cut off
            stranger.sendall(b"p" + (1000).to_bytes(8, "big"))
            while time.monotonic() < start + 5:
                stranger.sendall(b" ")
                time.sleep(0.05)
        assert time.monotonic() < start + 3
        assert second.meet({}, "") == meeting.result()


def test_an_error_names_only_the_first_of_very_many_absent_processes():
    (first, _) = groups(2, timeout=0.1)
    first.place = first.place._replace(size=10**9)
    with pytest.raises(RunFailed) as raised:
        first.meet({}, "")
    text = "process 1, 2, 3, 4, 5, 6, 7, 8 and 999999991 others of 1000000000 did not start"
    assert str(raised.value).startswith(text)


def test_a_process_that_has_come_to_its_end_is_no_loss_for_the_first(ends, monkeypatch):
    first, second, third = met(3)
    tell, died = group._tell, threading.Event()

    def slow(receivers, kind, content=b""):
        for link in receivers:
            tell([link], kind, content)
            if kind == links.ALL and not died.is_set():
                dies(second)  # before the third process has its answer
                time.sleep(0.5)
                died.set()

    monkeypatch.setattr(group, "_tell", slow)
    assert together([one.leave for one in (first, second, third)]) == [None] * 3
    assert died.is_set()
    assert not ends


@pytest.mark.parametrize("other", ["images", "labels"])
def test_data_of_other_bytes_are_refused_by_every_process(monkeypatch, other):
    several, own = met(2), threading.local()
    of_thread = SimpleNamespace(exchange=lambda content: own.group.exchange(content))
    monkeypatch.setattr(processes, "_group", of_thread)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    images, labels = np.zeros((4, 2, 2, 1), np.uint8), np.arange(4)
    same = data.Dataset(images, labels, 4)
    changed = same._replace(**{other: getattr(same, other).copy()})
    getattr(changed, other).flat[-1] = 1

    def compare(one, part):
        own.group = one
        _training._compare_data(_training.Setup(None, part, same, *[np.zeros(1)] * 2))

    alike = [lambda one=one: compare(one, same) for one in several]
    assert together(alike) == [None, None]
    first, second = (
        functools.partial(compare, *x) for x in zip(several, (same, changed), strict=True)
    )
    errors = together([first, second])
    assert [type(error) for error in errors] == [BadUse, BadUse]
    assert str(errors[0]) == str(errors[1])
    assert str(errors[0]).startswith("the SHA-256 of the training set is '")
    assert str(errors[0]).endswith(
        "in process 1: give every process the same data (--data_dir)"
    )


def test_a_port_in_use_is_named():
    first, _ = groups(2)
    with links.listen(HOST, first.place.port), pytest.raises(BadUse) as raised:
        first.meet({}, "")
    address = f"--coordinator={HOST}:{first.place.port}"
    assert str(raised.value).startswith(f"{address}: process 0 cannot listen there: ")


def dies(one):
    """Close the connections of a process, as the kernel does at its death."""
    with one._lock:
        one._ending.set()
    for link in one._links.values():
        with contextlib.suppress(OSError):  # the other side is dead already
            link._connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("dead", [0, 2])
def test_a_death_ends_every_other_process_with_one_line(ends, dead):
    several = met(3)
    dies(several[dead])
    lines = [
        f"error: process {dead} has died; resume with: command {number}\n"
        for number in range(3)
        if number != dead
    ]
    found = wait_for(ends, 2)
    assert [line.lstrip("\n") for line, _ in found] == lines
    assert [code for _, code in found] == [1, 1]


def test_a_silent_process_is_lost_after_the_timeout(ends, monkeypatch):
    beat = group.Several._beat

    def beat_unless_last(self, process, link):
        if self.place.number != 1:
            beat(self, process, link)

    monkeypatch.setattr(group.Several, "_beat", beat_unless_last)
    start = time.monotonic()
    met(2, timeout=0.6)
    (line, code), _ = wait_for(ends, 2)
    assert code == 1
    assert line.startswith("\nerror: process 1 has not answered for 0.6 s (--process_time")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BadUse("no split is called 'tran'"), "failed: no split is called 'tran'"),
        (KeyboardInterrupt(), "was interrupted"),
        (ValueError("first\nsecond"), "failed: first"),
        (ValueError(), "failed: ValueError"),
    ],
)
def test_an_error_of_one_process_ends_the_others_with_its_reason(ends, error, reason):
    several = met(3)
    assert several[1].fail(error) is error
    lines = [
        f"\nerror: process 1 {reason}; resume with: command 0\n",
        f"error: process 1 {reason}; resume with: command 2\n",
    ]
    assert [line for line, _ in wait_for(ends, 2)] == lines


def test_an_error_that_all_processes_have_is_their_own(ends):
    several = met(3)
    errors = [BadUse(str(number)) for number in range(3)]
    calls = [
        lambda one=one, error=error: one.fail(error)
        for one, error in zip(several, errors, strict=True)
    ]
    assert together(calls) == errors
    time.sleep(0.5)
    assert ends == []


def test_a_death_explains_the_error_of_a_collective_operation(ends):
    first, second = met(2)
    dies(second)
    error = first.fail(ValueError("Gloo all-reduce failed"))
    assert type(error) is RunFailed
    assert str(error) == "process 1 has died; resume with: command 0"
    time.sleep(0.5)
    assert ends == []


def test_a_forwarded_port_stays_open_when_the_other_side_dies():
    with links.listen(HOST, 0) as server:
        near_port = links.forward(HOST, server.getsockname()[1], timeout=5)
        with socket.create_connection((HOST, near_port)) as near:
            far, _ = server.accept()
            with far:
                near.sendall(b"question")
                assert far.recv(100) == b"question"
                far.sendall(b"answer")
                assert near.recv(100) == b"answer"
            near.settimeout(0.3)
            with pytest.raises(TimeoutError):
                near.recv(100)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"process_id": 2}, r"--process_id must lie in \[0, 2\)"),
        ({"num_processes": 1}, "--coordinator=HOST:PORT and --num_processes go together"),
        ({"coordinator": "host"}, "--coordinator must be HOST:PORT .*, got 'host'"),
        ({"coordinator": "host:99999"}, "--coordinator must be HOST:PORT"),
        ({"coordinator": "a..b:1"}, "--coordinator: 'a..b' is no name of a host"),
        ({"coordinator": f"{'a' * 64}:1"}, "is no name of a host: .*too long"),
        ({"coordinator": ":1"}, "--coordinator must be HOST:PORT"),
        ({"local_device_ids": "0,a"}, "--local_device_ids must be different numbers"),
        ({"num_processes": 0}, "--num_processes must be at least 1, got 0"),
        ({"local_device_ids": "0,00"}, "--local_device_ids must be different numbers"),
        ({"local_device_ids": "1,1"}, "--local_device_ids must be different numbers"),
        ({"process_timeout": 0.0}, r"--process_timeout must lie in \[1, 1e6\) seconds"),
        ({"process_timeout": float("nan")}, "--process_timeout must lie in"),
        ({"workdir": ""}, "several processes need one --workdir"),
        (
            {"coordinator": "", "num_processes": 1, "local_device_ids": "0"},
            "for one, set CUDA_VISIBLE_DEVICES=0",
        ),
    ],
)
def test_flags_of_processes_that_contradict_each_other_are_refused(flags, message):
    good = {"coordinator": "host:1", "num_processes": 2, "workdir": "here"}
    with pytest.raises(BadUse, match=message):
        processes.check(ulpm_flow.Config(**good | flags))


def test_the_processes_may_differ_in_what_is_their_own_alone():
    one = processes._settings(ulpm_flow.Config(workdir="here", process_id=1, cpu_devices=2))
    two = processes._settings(ulpm_flow.Config(workdir=os.path.abspath("here")))
    assert one == two
    assert {"the experiment", "--seed", "--num_processes", "the version of jax"} <= {*one}


@pytest.mark.parametrize("devices", [[1], [4], [2, 2], [1, 1, 1, 1], [3, 1, 2], [1] * 7])
def test_every_seed_has_one_place_in_order_and_the_last_one_fills_up(monkeypatch, devices):
    everywhere = [
        SimpleNamespace(process_index=process)
        for process, count in enumerate(devices)
        for _ in range(count)
    ]
    monkeypatch.setattr(_seeds, "Mesh", lambda used, _names: used)
    monkeypatch.setattr(jax, "devices", lambda: everywhere)
    monkeypatch.setattr(jax, "device_count", lambda: len(everywhere))
    for seeds in (1, 2, 3, 4, 5, 7, 8, 13, 32):
        places = []
        for process in range(len(devices)):
            local = [d for d in everywhere if d.process_index == process]
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            monkeypatch.setattr(jax, "local_devices", lambda local=local: local)
            division = _seeds.Division(seeds)
            assert 1 <= len(division._mesh) <= len(local)
            of_device = -(-seeds // len(everywhere))
            assert len(division._indices) == of_device * len(division._mesh)
            places += division._indices.tolist()
        assert places[:seeds] == [*range(seeds)]
        assert {*places[seeds:]} <= {seeds - 1}


def test_any_number_of_seeds_on_four_devices_has_the_results_of_one():
    subprocesses.output(subprocesses.command("divided_seeds"))


def commands(start, size, *flags):
    """Return the commands of the processes of a run."""
    common = (f"--coordinator={HOST}:{links.free_port(HOST)}", f"--num_processes={size}")
    return [[*start, *flags, *common, f"--process_id={i}"] for i in range(size)]


@contextlib.contextmanager
def started(several, **variables):
    """Start commands, and end those that still run."""
    env = os.environ | subprocesses.PATH | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, env=env, **pipes) for command in several]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def finished(several, **variables):
    """Return exit code, stdout and stderr of each command, all started at once."""
    with started(several, **variables) as running:
        outputs = [process.communicate(timeout=300) for process in running]
        return [
            (process.returncode, *output)
            for process, output in zip(running, outputs, strict=True)
        ]


def lines_of_errors(stderr):
    """Return the lines of stderr that report an error."""
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


def module(name):
    return (sys.executable, "-m", f"experiments.{name}")


FLOW = ("--seeds=3", "--num_classes=3", "--per_class=2", "--dim=4", "--num_times=40")
SIMPLE = subprocesses.command("simple_flow")


def rows(folder):
    """Return the content of the rows of a flow."""
    return (folder / "metrics.csv").read_bytes()


def test_processes_of_other_flags_end_before_any_work_with_one_line(tmp_path):
    several = commands(module("train_small"), 2, f"--workdir={tmp_path}/run")
    several[1] += ["--learning_rate=0.1", "--epochs=7"]
    expected = (
        "error: --epochs is 100 in process 0 and 7 in process 1, --learning_rate is 0.05 "
        "in process 0 and 0.1 in process 1: start all processes with the same flags\n"
    )
    assert finished(several) == [(2, "", expected)] * 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_flow_of_two_processes_resumed_by_one_has_the_rows_of_one(tmp_path):
    one = [[*SIMPLE, *FLOW, "--cpu_devices=2", f"--workdir={tmp_path}/one"]]
    two = commands(SIMPLE, 2, *FLOW, "--cpu_devices=1", f"--workdir={tmp_path}/two")
    assert [code for code, *_ in finished(one)] == [0]
    first, second = finished(two, INTERRUPT_AFTER="7")
    assert first[0] == 130
    assert "interrupted; resume with: python -m simple_flow" in first[2]
    assert second[:2] == (1, "")
    assert lines_of_errors(second[2]) == second[2].splitlines()
    assert second[2].startswith("error: process 0 was interrupted; resume with: python -m")
    resumed = [*SIMPLE, *FLOW, "--cpu_devices=2", f"--workdir={tmp_path}/two", "--resume"]
    assert [code for code, *_ in finished([resumed])] == [0]
    assert rows(tmp_path / "two") == rows(tmp_path / "one")


@pytest.mark.parametrize("dead", [0, pytest.param(1, marks=SLOW)])
def test_the_kill_of_a_process_ends_the_other_with_one_line(tmp_path, dead):
    several = commands(SIMPLE, 2, *FLOW, "--cpu_devices=1", f"--workdir={tmp_path}/run")
    with started(several, SLEEP_AFTER="3") as running:
        assert running[0].stdout.readline() == "asleep\n"
        start = time.monotonic()
        running[dead].send_signal(signal.SIGKILL)
        _, stderr = running[1 - dead].communicate(timeout=60)
    assert time.monotonic() - start < 10
    assert running[1 - dead].returncode == 1
    (line,) = lines_of_errors(stderr)
    assert stderr.endswith(f"{line}\n")
    assert line.startswith(f"error: process {dead} has died; resume with: python -m simple")
    assert f"--workdir={tmp_path}/run --resume" in line


@SLOW
def test_one_two_and_four_processes_of_a_flow_have_the_same_rows(tmp_path):
    flags = ("--seeds=5", *FLOW[1:], "--log_t_max=50")
    for size in (1, 2, 4):
        flags_of_machine = (f"--cpu_devices={4 // size}", f"--workdir={tmp_path}/{size}")
        several = commands(module("ulpm_flow"), size, *flags, *flags_of_machine)
        if size == 1:
            several = [[*module("ulpm_flow"), *flags, *flags_of_machine]]
        assert [code for code, *_ in finished(several)] == [0] * size
        assert rows(tmp_path / str(size)) == rows(tmp_path / "1")


@SLOW
def test_two_processes_of_a_deep_flow_have_the_rows_of_one(tmp_path):
    flags = ("--num_classes=3", "--factors=3", "--widths=1", "--scales=1", "--seeds=3")
    flags += ("--log_t_max=100",)
    start = (*module("deep_flow"), *flags)
    one = [[*start, "--cpu_devices=2", f"--workdir={tmp_path}/one"]]
    two = commands(start, 2, "--cpu_devices=1", f"--workdir={tmp_path}/two")
    for several in (one, two):
        assert [code for code, *_ in finished(several)] == [0] * len(several)
    for name in ("ends.csv", "trajectory.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (
            tmp_path / "two" / name
        ).read_bytes()


@SLOW
def test_two_processes_of_a_resnet_agree_with_one(tmp_path):
    settings = {
        "train_split": "train[:60]",
        "test_split": "",
        "width": 0.05,
        "epochs": 2,
        "batch_size": 20,
        "measurements": 2,
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    train_resnet.run(train_resnet.Config(workdir=str(tmp_path / "one"), **settings))
    two = commands(module("train_resnet"), 2, *flags, f"--workdir={tmp_path}/two")
    done = finished(two)
    assert [code for code, *_ in done] == [0, 0], done
    one, two = (_record.read_rows(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 2
    for row, other in zip(one, two, strict=True):
        np.testing.assert_allclose(row["loss"], other["loss"], rtol=1e-3)
        np.testing.assert_allclose(row["accuracy"], other["accuracy"], atol=0.05)
