"""Commands of the tests in forks of one process."""

import signal
import subprocess
import threading

import pytest
from run_module import run_module

MODULE = """
import sys, time
print("started", flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(3)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sleeper.py").write_text(MODULE)
    return tmp_path


def interrupt(*_):
    raise KeyboardInterrupt


def test_one_that_is_interrupted_does_not_answer_for_the_next(folder):
    assert run_module("sleeper", "0", cwd=folder).returncode == 3
    before = signal.signal(signal.SIGALRM, interrupt)  # that of pytest-timeout
    main = threading.get_ident()
    try:
        # to this thread: one that is sent to another does not end the wait
        threading.Timer(1, lambda: signal.pthread_kill(main, signal.SIGALRM)).start()
        with pytest.raises(KeyboardInterrupt):
            run_module("sleeper", "600", cwd=folder)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert run_module("sleeper", "0", cwd=folder).returncode == 3


def test_one_that_takes_too_long_is_ended(folder):
    with pytest.raises(subprocess.TimeoutExpired):
        run_module("sleeper", "600", cwd=folder, timeout_s=1)
    assert run_module("sleeper", "0", cwd=folder).returncode == 3
