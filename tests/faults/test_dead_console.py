"""Consoles that are dead, requests to stop at odd moments, threads that stay: no exit code lies."""

import contextlib
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import time
import tty

import pytest
from ranks import die_with
from runner import ROOT, Runner, find_all

pytestmark = pytest.mark.ranks

PLAIN = [sys.executable, "-m", "distrain"]
LATE = """
import atexit, os, signal
from distrain.cli import command as __main__
from distrain.runfolder import folder as runfolder
note_end = runfolder.RunFolder._note_end
def late(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    note_end(*args)
runfolder.RunFolder._note_end = late
atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))
__main__.main()
"""
THREAD = """
import threading, time
from distrain import HookBase
class Uploader(HookBase):
    def after_train(self):
        threading.Thread(target=time.sleep, args=(1000,), name="uploader").start()
"""
SHORT_GRACE = """
from distrain.cli import command as __main__
from distrain.process import threads
threads.GRACE_S = 0.5
__main__.main()
"""


@contextlib.contextmanager
def started(runner, *overrides, python=PLAIN, prefix=(), stdout, ignored=()):
    """Start the command on one rank with any console; kill what is left at the end."""
    parent = os.getpid()

    def prepare():
        die_with(parent)
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    settings = ["--config-dir", "conf", "+experiment=tiny", "launch.ranks=1", "data.workers=0"]
    process = subprocess.Popen(
        [*prefix, *python, *settings, *overrides],
        cwd=runner.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(runner.temporary)},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stdout,
        preexec_fn=prepare,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def await_checkpoint(runner, process):
    deadline = time.monotonic() + 120
    while not find_all(runner.run / "checkpoints"):
        assert process.poll() is None, f"it ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def end_of(runner):
    """Return the code that command.json has noted for the only start."""
    (start,) = json.loads((runner.run / "command.json").read_text())["starts"]
    return start["end"]["code"]


def check_stopped(runner, process):
    assert process.wait(120) == 75
    saved = find_all(runner.run / "checkpoints")[-1].name
    assert int(saved.removeprefix("iter_")) == int((runner.folder / "progress_0").read_text())
    assert end_of(runner) == 75
    assert "stopped, run again to continue" in (runner.run / "logs" / "rank_0.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_pipe_whose_reader_is_gone(tmp_path, number):
    """As in `2>&1 | tee log` and Ctrl-C, which ends tee, or in `2>&1 | head -1`."""
    runner = Runner(tmp_path, iterations=1_000_000)
    read, write = os.pipe()
    with started(runner, stdout=write) as process:
        os.close(write)
        os.read(read, 1)
        await_checkpoint(runner, process)
        os.close(read)
        process.send_signal(number)
        check_stopped(runner, process)


def test_a_terminal_that_is_gone(tmp_path):
    """As after a lost connection: SIGHUP, and EIO from then on."""
    runner = Runner(tmp_path, iterations=1_000_000)
    ours, theirs = pty.openpty()
    with started(runner, stdout=theirs) as process:
        os.close(theirs)
        await_checkpoint(runner, process)
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        check_stopped(runner, process)


def test_a_terminal_that_nobody_reads(tmp_path):
    """As one that Ctrl-S has stopped, or a lost connection that is not noticed yet."""
    runner = Runner(tmp_path, iterations=1_000_000)
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    with started(runner, stdout=theirs) as process:
        await_checkpoint(runner, process)
        fcntl.fcntl(theirs, fcntl.F_SETFL, os.O_NONBLOCK)
        with contextlib.suppress(BlockingIOError):  # until it takes no more
            while True:
                os.write(theirs, b"x" * 256)
        fcntl.fcntl(theirs, fcntl.F_SETFL, 0)
        process.send_signal(signal.SIGTERM)
        check_stopped(runner, process)
    os.close(ours)
    os.close(theirs)


def test_a_console_on_a_full_disk(tmp_path):
    runner = Runner(tmp_path, iterations=1_000_000)
    with open("/dev/full", "w") as full, started(runner, stdout=full) as process:
        await_checkpoint(runner, process)
        process.send_signal(signal.SIGTERM)
        check_stopped(runner, process)


def test_all_descriptors_closed_and_a_hangup_that_is_ignored(tmp_path):
    """As a daemon or nohup starts it."""
    runner = Runner(tmp_path, iterations=1_000_000)
    closed = ("sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-')
    ignored = [signal.SIGHUP]
    with started(runner, prefix=closed, stdout=subprocess.DEVNULL, ignored=ignored) as process:
        await_checkpoint(runner, process)
        process.send_signal(signal.SIGHUP)
        before = (
            len(find_all(runner.run / "checkpoints")),
            (runner.folder / "progress_0").read_text(),
        )
        while (runner.folder / "progress_0").read_text() <= before[1]:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        check_stopped(runner, process)


def test_a_request_after_the_last_save_does_not_change_the_exit_code(tmp_path):
    runner = Runner(tmp_path, iterations=20)
    late = [sys.executable, "-c", LATE]
    with started(runner, python=late, stdout=subprocess.DEVNULL) as process:
        assert process.wait(120) == 0
    assert end_of(runner) == 0
    assert find_all(runner.run / "checkpoints")[-1].name == "iter_0000000020"


@pytest.mark.parametrize("launch", [[], ["launch.in_process=true"]], ids=["rank", "in process"])
def test_a_thread_that_stays_is_named_and_ended(tmp_path, launch):
    runner = Runner(tmp_path, iterations=20)
    (tmp_path / "uploading.py").write_text(THREAD)
    settings = ["+hooks.uploader._target_=uploading.Uploader", *launch]
    short = [sys.executable, "-c", SHORT_GRACE]
    with started(runner, *settings, python=short, stdout=subprocess.DEVNULL) as process:
        assert process.wait(120) == 0
    log = (runner.run / "logs" / "rank_0.log").read_text()
    assert "thread uploader still ran 0.5 s after the end of the job" in log
    assert end_of(runner) == 0
