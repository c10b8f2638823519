"""Child processes of a rank."""

import os
import resource
from collections.abc import Iterator

import pytest

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
