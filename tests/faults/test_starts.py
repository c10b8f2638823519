"""Starts side by side: one owner of a folder, no port twice, nothing open to others."""

import contextlib
import os
import signal
import time
from datetime import timedelta

import flatness
import psutil
import pytest
from ranks import FORK
from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistNetworkError

from distrain.errors import ConfigError
from distrain.launch.rank import append
from distrain.launch.rendezvous import StaticRendezvous
from distrain.runfolder import lock as folderlock
from distrain.runfolder.folder import RunFolder

STARTS = 16


def together(fn, num, *args):
    """Return what `fn(number, *args)` returned in each of some processes that start together."""
    gate, answers = FORK.Barrier(num), FORK.SimpleQueue()

    def main(number):
        gate.wait()
        answers.put(fn(number, *args))
        gate.wait()

    processes = [FORK.Process(target=main, args=(number,)) for number in range(num)]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def own(number, folder, done):
    """Try to be the owner of a folder until all have tried; return what was said."""
    try:
        with RunFolder(folder):
            done.release()
            while done.get_value() < STARTS:
                time.sleep(0.01)
            return "owner"
    except ConfigError as error:
        done.release()
        return str(error)


def test_of_many_starts_in_one_folder_one_owns_it(tmp_path):
    said = together(own, STARTS, tmp_path / "run", FORK.Semaphore(0))
    refused = [text for text in said if text != "owner"]
    assert len(refused) == STARTS - 1
    assert all(text.endswith("runs here already") and "process" in text for text in refused)
    assert all("\n" not in text for text in refused)


def test_without_the_lock_all_would_own_it(tmp_path, monkeypatch):
    """The negative control."""
    monkeypatch.setattr(folderlock, "hold", lambda path: os.open(os.devnull, os.O_RDONLY))
    assert together(own, STARTS, tmp_path / "run", FORK.Semaphore(0)) == ["owner"] * STARTS


def meet(number, _):
    """Meet as the only node of a run, and use the store of its ranks."""
    meeting = StaticRendezvous(run_id="the same")  # the store ends with it
    found = meeting.next_rendezvous().bootstrap_store_info
    timeout = timedelta(seconds=30)
    store = TCPStore(found.master_addr, found.master_port, is_master=False, timeout=timeout)
    count = store.add("ranks of this run", 1)
    return found.master_port, count


def test_twenty_starts_at_once_have_twenty_ports_and_stores():
    found = together(meet, 20, None)
    assert len({port for port, _ in found}) == 20
    assert {count for _, count in found} == {1}  # nobody joined the store of another


def test_a_fixed_port_would_clash():
    """The negative control: what MASTER_PORT with a default is to two runs on a machine."""
    with contextlib.closing(_Store(0)) as first, pytest.raises(DistNetworkError):
        _Store(first.port)


class _Store:
    def __init__(self, port):
        self.store = TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=5),
        )
        self.port = self.store.port

    def close(self):
        del self.store


def listening(*processes):
    """Return the addresses at which processes listen."""
    return {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


@pytest.mark.ranks
def test_a_run_listens_on_loopback_only_and_nobody_else_writes_its_files(tmp_path):
    flatness.write(tmp_path, iterations=10_000_000)
    before = os.umask(0)  # the worst that a user may have
    try:
        with flatness.started(
            tmp_path, "checkpoint.keep_last=1", "hooks.checkpoint.period=20"
        ) as run:
            run_dir = tmp_path / "runs" / "flat"
            deadline = time.monotonic() + 120
            while not list(run_dir.glob("checkpoints/iter_*")):
                assert run.poll() is None, (tmp_path / "console.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            tree = psutil.Process(run.pid)
            addresses = listening(tree, *tree.children(recursive=True))
            run.send_signal(signal.SIGTERM)
            assert run.wait(120) == 75
    finally:
        os.umask(before)
    assert addresses == {"127.0.0.1"}
    modes = {path: path.stat().st_mode for path in [run_dir, *run_dir.rglob("*")]}
    assert len(modes) > 10
    assert [str(path) for path, mode in modes.items() if mode & 0o002] == []


def test_the_store_of_torch_alone_listens_everywhere():
    """The negative control."""
    with contextlib.closing(_Store(0)) as store:
        everywhere = {
            connection.laddr.ip
            for connection in psutil.Process().net_connections("inet")
            if connection.laddr.port == store.port and connection.status == psutil.CONN_LISTEN
        }
    assert everywhere <= {"::", "0.0.0.0"}
    assert everywhere


NUM_LINES = 200


def lines_of(number):
    return [f"rank {number} line {at} {'x' * (1000 + at * 35)}\n" for at in range(NUM_LINES)]


def write_lines(number, path, how):
    for line in lines_of(number):
        if how == "append":
            append(str(path), line)
        else:
            with open(path, "ab", buffering=0) as file:
                half = len(line) // 2
                file.write(line[:half].encode())
                os.sched_yield()
                time.sleep(0)
                file.write(line[half:].encode())


@pytest.mark.parametrize("how", ["append", "two writes"])
def test_lines_of_four_processes_stay_whole(tmp_path, how):
    """With two writes a line, the negative control, they do not."""
    together(write_lines, 4, tmp_path / "log", how)
    lines = (tmp_path / "log").read_text().splitlines(keepends=True)
    expected = sorted(line for number in range(4) for line in lines_of(number))
    assert (sorted(lines) == expected) is (how == "append")
