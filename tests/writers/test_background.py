"""The writers' thread: nothing lost, nothing slow in the caller, one warning for a failing disk."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distrain.errors import ConfigError
from distrain.files import append_file as appendfile
from distrain.writers import background as writers
from distrain.writers.background import BackgroundWriter, NewScalars
from distrain.writers.base import Row, RunInfo, Writer
from distrain.writers.defaults import default_writers
from distrain.writers.json_lines import JsonLinesWriter

RUN = RunInfo(Path())


class Recorder(Writer):
    error: Exception

    def __init__(self) -> None:
        self.iterations: list[int] = []
        self.threads: set[int] = set()
        self.closed = 0

    def write(self, row: Row) -> None:
        self.iterations.append(row.iteration)
        self.threads.add(threading.get_ident())

    def close(self) -> None:
        self.closed += 1


class Failing(Writer):
    """Fails in the iterations given, and on close if told so."""

    def __init__(self, *iterations: int, error: Exception, close: bool = False) -> None:
        self.iterations, self.error, self.fail_close = iterations, error, close

    def write(self, row: Row) -> None:
        if row.iteration in self.iterations:
            raise self.error

    def close(self) -> None:
        if self.fail_close:
            raise self.error


def test_a_row_without_news_is_no_sign_that_a_writer_works_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        lost = Failing(0, 2, error=OSError("Connection lost"), close=True)
        writer = BackgroundWriter([lost], RUN)
        for iteration in range(3):
            writer.write(Row(iteration, 3, {"loss": (1.0, 0 if iteration < 2 else 2)}))
        writer.close()
    assert [r.getMessage() for r in caplog.records] == [
        "Failing: Connection lost; training goes on without",
        "Failing: Connection lost; its end is missing",
    ]


def test_new_scalars() -> None:
    new = NewScalars(start_iteration=10)
    assert new({"a": (1.0, 12), "b": (2.0, 9), "c": (3.0, 10)}) == {"a": (1.0, 12), "c": (3.0, 10)}
    assert new({"a": (1.0, 13), "b": (2.0, 9), "c": (3.0, 10)}) == {"a": (1.0, 13)}


def test_a_writer_is_opened_first_and_finished_before_it_is_closed() -> None:
    calls: list[object] = []

    class Calls(Writer):
        def open(self, run: RunInfo) -> None:
            calls.append((run.start_iteration, threading.get_ident()))

        def write(self, row: Row) -> None:
            calls.append(dict(row.new))

        def finish(self, metrics: Mapping[str, float]) -> None:
            calls.append(metrics)

        def close(self) -> None:
            calls.append("closed")

    writer = BackgroundWriter([Calls(), Writer()], RunInfo(Path(), 3))
    writer.write(Row(3, 5, {"old": (1.0, 2), "new": (1.0, 3)}))
    writer.finish({"new": 2.0})
    writer.close()
    mine = threading.get_ident()
    assert calls == [(3, mine), {"new": (1.0, 3)}, {"new": 2.0}, "closed"]


def test_a_writer_that_cannot_be_opened_gets_no_rows(caplog: pytest.LogCaptureFixture) -> None:
    class Offline(Recorder):
        def open(self, run: RunInfo) -> None:
            raise self.error

    offline, other = Offline(), Recorder()
    offline.error = ConnectionError("no route to host")
    writer = BackgroundWriter([offline, other], RUN)
    writer.write(Row(0, 1, {}))
    writer.close()
    assert (offline.iterations, offline.closed, other.iterations) == ([], 0, [0])
    [record] = caplog.records
    assert record.getMessage() == "Offline: no route to host; training goes on without"
    offline.error = ConfigError("project=x: expected a project of yours")
    with pytest.raises(ConfigError, match="project=x"):
        BackgroundWriter([offline], RUN)


def test_background_writes_all_in_one_other_thread() -> None:
    first, second = Recorder(), Recorder()
    writer = BackgroundWriter([first, second], RUN)
    for iteration in range(500):
        writer.write(Row(iteration, 500, {}))
    writer.close()
    writer.close()
    for recorder in (first, second):
        assert recorder.iterations == list(range(500))
        assert recorder.closed == 1
    assert first.threads == second.threads
    assert threading.get_ident() not in first.threads
    assert "distrain-writers" not in [thread.name for thread in threading.enumerate()]


def test_caller_does_not_wait_and_rows_are_bounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writers, "MAX_WAITING_ROWS", 5)
    gate = threading.Event()
    started = threading.Event()

    class Hanging(Recorder):
        def write(self, row: Row) -> None:
            started.set()
            gate.wait()
            super().write(row)

    hanging = Hanging()
    writer = BackgroundWriter([hanging], RUN)
    writer.write(Row(0, 99, {}))
    started.wait()
    for iteration in range(1, 20):  # returns though the first write still hangs
        writer.write(Row(iteration, 99, {}))
    gate.set()
    writer.close()
    assert hanging.iterations == [0, 1, 2, 3, 4, 5]
    assert [r.getMessage() for r in caplog.records] == [
        "the writers hang: rows from iteration 6 on are lost",
        "the writers hang: 14 rows were lost",
    ]


def test_writers_that_hang_are_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writers, "HANG_S", 0.05)
    gate = threading.Event()

    class Hanging(Recorder):
        def write(self, row: Row) -> None:
            gate.wait()
            super().write(row)

    hanging = Hanging()
    writer = BackgroundWriter([hanging], RUN)
    writer.write(Row(0, 99, {}))
    writer.close()
    assert (hanging.iterations, hanging.closed) == ([], 0)
    assert [r.getMessage() for r in caplog.records] == [
        "the writers hang: rows not written within 0.05 s are lost"
    ]
    gate.set()
    writer._files._thread.join()


def test_writers_that_are_slow_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writers, "HANG_S", 0.5)

    class Slow(Recorder):
        def write(self, row: Row) -> None:
            threading.Event().wait(0.05)  # as HANG_S, whatever `make test-clock` does to time.sleep
            super().write(row)

    slow = Slow()
    writer = BackgroundWriter([slow], RUN)
    for iteration in range(20):  # 1 s of work
        writer.write(Row(iteration, 20, {}))
    writer.close()
    assert (slow.iterations, slow.closed) == (list(range(20)), 1)
    assert caplog.records == []


def test_failing_writer_costs_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    other = Recorder()
    full = OSError(28, "No space left on device", "file")
    with caplog.at_level(logging.INFO):
        writer = BackgroundWriter([Failing(2, 3, 4, 7, error=full), other], RUN)
        for iteration in range(10):
            writer.write(Row(iteration, 10, {"loss": (1.0, iteration)}))
        writer.close()
    assert other.iterations == list(range(10))
    warning = "Failing: [Errno 28] No space left on device: 'file'; training goes on without"
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", warning),
        ("INFO", "Failing works again"),
        ("WARNING", warning),
        ("INFO", "Failing works again"),
    ]


def test_rows_lost_at_the_end_are_counted_though_the_failure_was_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(fd: int, data: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(appendfile.os, "write", fail)
    writer = BackgroundWriter([JsonLinesWriter("m")], RunInfo(tmp_path))
    for iteration in range(3):
        writer.write(Row(iteration, 3, {"loss": (1.0, iteration)}))
    writer.close()
    error = "JsonLinesWriter: [Errno 28]"
    assert [r.getMessage() for r in caplog.records] == [
        f"{error} No space left on device: '{tmp_path}/m'; training goes on without",
        f"{error} 3 records are lost: No space left on device: '{tmp_path}/m'; its end is missing",
    ]


def test_a_bug_is_shown_with_its_place(caplog: pytest.LogCaptureFixture) -> None:
    other = Recorder()
    writer = BackgroundWriter([Failing(error=TypeError("oops"), close=True), other], RUN)
    writer.close()
    assert other.closed == 1
    assert "Failing: oops" in caplog.text
    assert "in close\n    raise self.error\nTypeError: oops" in caplog.text


def test_default_writers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distrain.writers.console.LINE_S", 0.0)  # each row is shown
    for start in (0, 10):
        writer = BackgroundWriter(default_writers(), RunInfo(tmp_path, start))
        for iteration in range(start + 4, start + 15, 5):
            writer.write(Row(iteration, 25, {"loss": (1 / (iteration + 1 + start), iteration)}))
        writer.close()
    # 4, 9 of the first attempt (14 is replayed), 14, 19, 24 of the second
    values = [1 / 5, 1 / 10, 1 / 25, 1 / 30, 1 / 35]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"iteration": i, "loss": v} for i, v in zip((4, 9, 14, 19, 24), values, strict=True)
    ]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (i, pytest.approx(v)) for i, v in zip((4, 9, 14, 19, 24), values, strict=True)
    ]
    assert len(capsys.readouterr().out.splitlines()) == 6


FULL_DISK = """
import logging, resource, sys, time
from pathlib import Path
from distrain.writers.background import BackgroundWriter
from distrain.writers.base import Row, RunInfo
from distrain.writers.defaults import default_writers
logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
writer = BackgroundWriter(default_writers(), RunInfo(Path(sys.argv[1])))
for iteration in range(60):
    if iteration == 20:
        writer_is_idle = time.sleep(0.2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    if iteration == 40:
        time.sleep(0.2)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.write(Row(iteration, 60, {f"loss{k}": (k / 3, iteration) for k in range(30)}))
writer.close()
"""


def test_full_disk_is_survived_and_nothing_is_lost(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    said = done.stderr.splitlines()
    assert sum(line.startswith("WARNING TensorBoardWriter: [Errno 27]") for line in said) == 1
    assert sum(line.startswith("WARNING JsonLinesWriter: [Errno 27]") for line in said) == 1
    assert len(said) == 4  # and both work again
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == list(range(60))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss29")] == list(range(60))


KILLED = """
import os, sys, time
from pathlib import Path
from distrain.writers.background import BackgroundWriter
from distrain.writers.base import Row, RunInfo
from distrain.writers.defaults import default_writers
writer = BackgroundWriter(default_writers(), RunInfo(Path(sys.argv[1])))
for iteration in range(1_000_000):
    writer.write(Row(iteration, 60, {f"loss{k}": (k / 3, iteration) for k in range(30)}))
    time.sleep(0.001)
"""


def test_kill_leaves_whole_records(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line.removeprefix("iter ").split("/")[0]) >= 30:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    text = (tmp_path / "metrics.jsonl").read_text()
    iterations = [json.loads(line)["iteration"] for line in text.splitlines()]
    assert text.endswith("\n")
    assert len(iterations) > 30
    assert iterations == list(range(len(iterations)))
    events = EventAccumulator(str(tmp_path)).Reload()
    steps = [event.step for event in events.Scalars("loss29")]
    assert steps == list(range(len(steps)))
    assert abs(len(steps) - len(iterations)) <= 1  # TensorBoard's file is written first
