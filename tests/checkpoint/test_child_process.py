"""Child processes of a rank."""

import os
import resource
import time
from collections.abc import Iterator

import pytest

from distrain.checkpoint import child_process
from distrain.checkpoint.child_process import ChildProcess

ECHO = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"


@pytest.fixture
def many_open_files() -> Iterator[None]:
    """Leave descriptors from 1024 on only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip("needs 1200 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    opened: list[int] = []
    while not opened or opened[-1] < 1024:
        opened.append(os.open(os.devnull, os.O_RDONLY))
    yield
    for fd in opened:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_open_files")
def test_answers_arrive_with_more_than_1024_open_files() -> None:
    child = ChildProcess("echo", ECHO, [])
    try:
        assert child.receive(wait_s=0.0) is None
        child.send({"a": 1})
        assert child.receive(wait_s=30.0) == {"a": 1}
    finally:
        child.kill()


def test_a_process_that_no_signal_ends_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that waits for a file server which hangs."""
    monkeypatch.setattr(child_process, "_KILL_S", 0.1)
    child = ChildProcess("sleeper", "import time; time.sleep(60)", [])
    process = child._process
    with monkeypatch.context() as patch:
        patch.setattr(process, "kill", lambda: None)
        started = time.monotonic()
        child.kill()
        assert time.monotonic() - started < 10
    assert process.poll() is None
    process.kill()
    process.wait()
