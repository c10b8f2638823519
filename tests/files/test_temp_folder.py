"""Temporary folders: gone at the end, and after kill -9 with the next one that is made."""

import multiprocessing.connection
import os
import signal
import subprocess
import sys
import tempfile

import pytest

from distrain.files import temp_folder as tempfolder
from distrain.files.temp_folder import TemporaryFolder, folder_of_processes

HOLD = """
import os, sys, time
from distrain.files.temp_folder import TemporaryFolder
folder = TemporaryFolder("held-", parent=sys.argv[1])
child = os.fork()
if not child:
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_private_and_gone_at_the_end(temporary):
    with TemporaryFolder("x-") as path:
        assert os.path.dirname(path) == str(temporary)
        assert os.path.basename(path).startswith("distrain-x-")
        assert os.stat(path).st_mode & 0o777 == 0o700
        (temporary / path / "sub").mkdir()
    assert os.listdir(temporary) == []
    folder = TemporaryFolder()
    folder.close()
    folder.close()
    assert os.listdir(temporary) == []


def test_the_folder_of_a_killed_process_is_removed_when_its_children_are_gone_too(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        [held] = os.listdir(tmp_path)
        with TemporaryFolder(parent=str(tmp_path)):
            assert held in os.listdir(tmp_path), "its process lives"
        process.kill()
        process.wait()
        with TemporaryFolder(parent=str(tmp_path)):
            assert held in os.listdir(tmp_path), "its child lives"
        os.kill(child, signal.SIGKILL)
        process.stdout.read()  # its end: the child is gone
    folder = TemporaryFolder(parent=str(tmp_path))
    assert os.listdir(tmp_path) == [os.path.basename(folder.path)]
    folder.close()


def test_a_folder_that_is_abandoned_meanwhile_goes_at_the_end(tmp_path):
    first = TemporaryFolder(parent=str(tmp_path))
    with TemporaryFolder(parent=str(tmp_path)):
        os.close(first._lock)
    assert os.listdir(tmp_path) == []


def test_what_is_not_ours_is_left_alone(tmp_path):
    host = tempfolder.socket.gethostname()
    for name, text in [
        ("distrain-of_another_host", f"{host}-2"),
        ("distrain-just_being_made", ""),
        ("distrain-without_a_lock", None),
        ("of_another_program", host),
    ]:
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / tempfolder._LOCK_FILE).write_text(text)
    (tmp_path / "distrain-link").symlink_to(tmp_path / "of_another_program")
    (tmp_path / "distrain-file").write_text("")
    before = sorted(os.listdir(tmp_path))
    with TemporaryFolder(parent=str(tmp_path)):
        pass
    assert sorted(os.listdir(tmp_path)) == before
    (tmp_path / "of_another_program").rename(tmp_path / "distrain-ours")
    with TemporaryFolder(parent=str(tmp_path)):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted({*before} - {"of_another_program"})


SOCKETS = """
import multiprocessing, os, sys, tempfile
from multiprocessing.util import get_temp_dir
from distrain.files.temp_folder import folder_of_processes, use_inherited

def grandchild():
    print(get_temp_dir(), flush=True)
    print(os.path.dirname(tempfile.mkstemp()[1]), flush=True)
    print(os.environ["TORCHINDUCTOR_CACHE_DIR"])

def child(method):
    use_inherited()
    process = multiprocessing.get_context("fork").Process(target=grandchild)
    process.start()
    process.join()

if __name__ == "__main__":
    with folder_of_processes() as path:
        process = multiprocessing.get_context(sys.argv[1]).Process(target=child, args=sys.argv[1:])
        process.start()
        process.join()
        assert tempfile.gettempdir() == path
    assert path not in (get_temp_dir(), tempfile.gettempdir())
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_keep_their_sockets_there(tmp_path, method):
    (tmp_path / "sockets.py").write_text(SOCKETS)
    env = {name: text for name, text in os.environ.items() if name != tempfolder._CACHE}
    with tempfile.TemporaryDirectory() as temporary:  # a short path
        done = subprocess.run(
            [sys.executable, str(tmp_path / "sockets.py"), method],
            env=env | {"TMPDIR": temporary},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        sockets, files, cache = done.stdout.splitlines()
        assert sockets == files
        assert os.path.dirname(files) == os.path.dirname(cache) == temporary
        assert os.listdir(temporary) == []


def test_a_tmpdir_too_long_for_sockets_is_not_used(temporary, monkeypatch):
    long = temporary / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with folder_of_processes() as path:
        assert os.path.dirname(path) == "/tmp"
        with multiprocessing.connection.Listener(family="AF_UNIX") as listener:
            assert os.path.dirname(listener.address) == path
    assert not os.path.exists(path)
    assert os.listdir(long) == []
