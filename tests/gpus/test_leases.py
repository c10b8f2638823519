"""Leases of GPUs and the queue for them: one run per GPU, in order, also after kills."""

import errno
import json
import multiprocessing
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from stand_in import LIBRARY

from distrain.errors import ConfigError, RunFailed
from distrain.gpus import claim as claims
from distrain.gpus import leases, queue, shared_files
from distrain.gpus.claim import Claim, own_claim
from distrain.gpus.leases import Leases, holders, take
from distrain.gpus.queue import Blocked, enter, steps_aside, try_claim, waiting
from distrain.gpus.shared_files import close, folder, mutex, try_lock

FORK = multiprocessing.get_context("fork")
ARRIVALS = Path(__file__).with_name("arrivals.py")
IDLE = dict.fromkeys(["a", "b", "c", "d"], "")
NOBODY = 65534


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The directory of the leases."""
    path = tmp_path / "leases"
    monkeypatch.setenv(shared_files.VARIABLE, str(path))
    return folder()


def claim(gpus, count=None, *, nice=False, since=0.0, run="run"):
    count = len(gpus) if count is None else count
    return Claim(run, "alice", os.getpid(), since, nice, count, tuple(gpus))


def held(place):
    with mutex(place):
        return sorted(holders(place, IDLE))


def queued(place):
    with mutex(place):
        return [each.run for each in waiting(place)]


def got(found):
    assert isinstance(found, Leases), found
    return "".join(found.claim.gpus)


class Child:
    """A forked process that runs `fn` and then sleeps until it is killed."""

    def __init__(self, fn):
        read, write = FORK.Pipe(duplex=False)

        def main():
            try:
                write.send((True, fn()))
            except BaseException as error:
                write.send((False, repr(error)))
            time.sleep(1000)

        self._process = FORK.Process(target=main)
        self._process.start()
        write.close()
        self.pid = self._process.pid
        assert read.poll(60)
        is_done, self.result = read.recv()
        assert is_done, self.result

    def kill(self):
        self._process.kill()
        self._process.join()


def test_two_runs_do_not_hold_one_gpu(place):
    first = try_claim(place, claim("ab"), IDLE)
    assert got(first) == "ab"
    blocked = try_claim(place, claim("bcd", run="other"), IDLE)
    assert isinstance(blocked, Blocked)
    assert (blocked.idle, blocked.ahead) == (["c", "d"], [])
    assert blocked.holders["b"].run == "run"
    second = try_claim(place, claim("abcd", 2), IDLE)
    assert got(second) == "cd"
    first.close()
    assert held(place) == ["c", "d"]
    second.close()
    assert held(place) == []


def test_a_gpu_in_use_without_a_lease_is_not_taken(place):
    found = try_claim(place, claim("abc", 2), IDLE | {"a": "used by process 1"})
    assert got(found) == "bc"
    found.close()


def test_a_lease_ends_with_the_last_process_of_its_run(place):
    def rank(paths):
        return Child(lambda: leases.hold(paths))

    def command():
        found = try_claim(place, claim("ab"), IDLE)
        return rank(found.paths).pid

    launcher = Child(command)
    assert held(place) == ["a", "b"]
    launcher.kill()
    assert held(place) == ["a", "b"]  # its rank lives
    os.kill(launcher.result, signal.SIGKILL)
    deadline_s = time.monotonic() + 60
    while held(place):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_forked_child_does_not_hold_the_lease(place):
    found = try_claim(place, claim("a"), IDLE)
    worker = Child(lambda: None)  # as a worker of a loader: it calls no `hold`
    assert held(place) == ["a"]
    found.close()
    assert held(place) == []
    worker.kill()


def test_a_lease_whose_file_was_removed_is_restored_unless_another_run_was_faster(place):
    first = try_claim(place, claim("ab"), IDLE)
    first.restore(1.0)
    shutil.rmtree(place)
    first.restore(1.0)
    assert held(place) == ["a", "b"]
    assert try_claim(place, claim("b"), IDLE).holders["b"].gpus == ("a", "b")
    rank = Child(lambda: leases.hold(first.paths))  # after a restart
    first.close()
    assert held(place) == ["a", "b"]
    rank.kill()
    first = try_claim(place, claim("a"), IDLE)
    (place / "gpu-a").unlink()
    other = try_claim(place, claim("a", run="other"), IDLE)
    with pytest.raises(ConfigError, match=r"gpu-a: removed, and leased by alice \(other, process"):
        first.restore(1.0)
    other.close()
    first.restore(1.0)
    assert held(place) == ["a"]
    first.close()


def test_a_rank_does_not_share_the_lease_of_another_run(place, monkeypatch):
    monkeypatch.setattr(leases, "_PAUSE_S", 0.0)
    path = leases.lease_path(place, "a")
    fd = try_lock(path)
    with pytest.raises(RunFailed, match="another run holds the lease of this GPU"):
        leases.hold([str(path)])
    close(fd)


def test_runs_wait_in_order_nice_ones_behind(place):
    holder = try_claim(place, claim("ab"), IDLE)
    tickets = {
        name: enter(place, claim(gpus, count, nice=nice, run=name))
        for name, gpus, count, nice in [
            ("nice", "a", 1, True),
            ("first", "ab", 2, False),
            ("second", "a", 1, False),
            ("elsewhere", "cd", 1, False),
        ]
    }
    assert queued(place) == ["first", "second", "elsewhere", "nice"]

    def attempt(name):
        return try_claim(place, tickets[name].claim, IDLE, tickets[name])

    blocked = attempt("nice")
    assert [each.run for each in blocked.ahead] == ["first", "second"]
    assert [each.run for each in attempt("first").behind] == ["second", "nice"]
    got_elsewhere = attempt("elsewhere")  # it wants no GPU of theirs
    assert got(got_elsewhere) == "c"
    holder.close()
    assert isinstance(attempt("second"), Blocked)  # a and b are free, but it is not its turn
    assert isinstance(try_claim(place, claim("b"), IDLE), Blocked)  # nor that of one without ticket
    got_first = attempt("first")
    assert got(got_first) == "ab"
    assert queued(place) == ["second", "nice"]
    got_first.close()
    got_second = attempt("second")
    assert isinstance(attempt("nice"), Blocked)
    got_second.close()
    got_nice = attempt("nice")
    for each in (got_nice, got_elsewhere):
        each.close()
    assert queued(place) == held(place) == []


def test_one_that_does_not_wait_passes_nice_runs_only(place):
    ticket = enter(place, claim("a", nice=True))
    assert isinstance(try_claim(place, claim("a", nice=True), IDLE), Blocked)
    found = try_claim(place, claim("a"), IDLE)
    assert got(found) == "a"
    found.close()
    ticket.leave()


def test_a_dead_run_has_no_place_and_numbers_grow(place):
    dead = Child(lambda: enter(place, claim("a", run="dead")).claim.number)
    assert queued(place) == ["dead"]
    dead.kill()
    assert queued(place) == []
    later = enter(place, claim("a"))
    assert later.claim.number > dead.result
    assert queue.announced(place) == {os.getpid()}
    later.leave()
    assert queue.announced(place) == set()


def test_a_run_passes_one_that_waits_for_other_gpus(place):
    """One with CUDA_VISIBLE_DEVICES=0 waits for a busy GPU 0: those that see all take the rest."""
    busy = IDLE | {"a": "used by process 1"}
    first = enter(place, claim("a", run="first"))
    assert got(found := try_claim(place, claim("abc", 2), busy)) == "bc"
    found.close()
    blocked = try_claim(place, claim("abc", 3), IDLE)
    assert (blocked.idle, blocked.ahead[0].run) == (["b", "c"], "first")  # a is not free for it
    nice = take(place, claim("b", nice=True))
    second = enter(place, claim("ab", 1, run="second"))
    assert steps_aside(place, nice.claim, busy).run == "second"
    nice.close()
    assert got(found := try_claim(place, second.claim, IDLE, second)) == "b"
    for each in (found.close, first.leave):
        each()


def test_a_stopped_run_keeps_its_place_but_lets_others_pass(place, monkeypatch):
    stopped = Child(lambda: enter(place, claim("a", run="stopped")).claim)
    later = enter(place, claim("a", run="later"))
    assert isinstance(try_claim(place, later.claim, IDLE, later), Blocked)
    nice = claim("a", nice=True)
    assert [each.run for each in queue.rivals(place, nice)] == ["stopped", "later"]
    later_s = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later_s)
    assert isinstance(found := try_claim(place, later.claim, IDLE, later), Leases)
    found.close()
    assert queue.rivals(place, nice) == []  # a nice run does not step aside for it
    assert queued(place) == ["stopped"]
    back = queue.Ticket(stopped.result, place / "ticket-0", os.open(place / "ticket-0", os.O_RDWR))
    back.write()  # it looks again
    assert isinstance(try_claim(place, claim("a"), IDLE), Blocked)
    stopped.kill()


def test_a_full_disk_does_not_take_the_content_of_a_ticket(place, monkeypatch):
    ticket = enter(place, claim("a", run="first"))

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space"):
            ticket.write()
    with monkeypatch.context() as patch:
        patch.setattr(claims, "write", full)
        with pytest.raises(ConfigError, match="No space"):
            enter(place, claim("a"))
    assert queued(place) == ["first"]
    assert claims.read(place / "ticket-0").run == "first"
    ticket.leave()


def test_a_run_whose_ticket_was_removed_takes_its_place_again(place):
    first, second = (enter(place, claim("a", run=run)) for run in ("first", "second"))
    time.sleep(0.01)  # the order that is kept without files is that of milliseconds
    shutil.rmtree(place)
    new = enter(folder(), claim("a", run="new"))  # it has the file of the first
    first = enter(folder(), first.claim, first)
    assert enter(folder(), first.claim, first) is first
    second = enter(folder(), second.claim, second)
    assert queued(place) == ["first", "second", "new"]
    for each in (first, second, new):
        each.leave()


def test_the_user_of_a_claim_is_that_of_the_process(monkeypatch):
    monkeypatch.setenv("USER", "somebody-else")
    monkeypatch.setenv("LOGNAME", "somebody-else")
    user = pwd.getpwuid(os.getuid()).pw_name
    assert own_claim("run", ["a"], count=1, nice=False).user == user


def test_numbers_grow_past_those_that_wait_where_the_counter_is_lost(place):
    first = enter(place, claim("a"))
    (place / "mutex").unlink()
    second = enter(place, claim("a"))
    assert second.claim.number > first.claim.number
    first.leave()
    second.leave()


@pytest.mark.parametrize(
    ("wants", "count", "busy", "stepping"),
    [
        ("ab", 1, "", "b"),  # the one that began last
        ("ab", 2, "", "ab"),
        ("a", 1, "", "a"),
        ("abc", 1, "", ""),  # c is idle
        ("abc", 2, "", "b"),
        ("abc", 2, "c", "ab"),
        ("abc", 3, "c", ""),  # it could not begin anyway
        ("d", 1, "", ""),
        ("abcd", 4, "", ""),  # d is held by a run that is not nice
    ],
)
def test_as_many_nice_runs_step_aside_as_are_needed(place, wants, count, busy, stepping):
    nice = [
        take(place, claim("a", nice=True, since=1.0)),
        take(place, claim("b", nice=True, since=2.0)),
    ]
    other = take(place, claim("d", since=3.0))
    uses = IDLE | dict.fromkeys(busy, "used")
    assert not any(steps_aside(place, each.claim, uses) for each in nice)
    ticket = enter(place, claim(wants, count))
    aside = [each for each in nice if steps_aside(place, each.claim, uses)]
    assert "".join(each.claim.gpus[0] for each in aside) == stepping
    ticket.leave()
    ticket = enter(place, claim(wants, count, nice=True))  # nice runs do not push each other out
    assert not any(steps_aside(place, each.claim, uses) for each in nice)
    for each in (*nice, other, ticket):
        getattr(each, "close", getattr(each, "leave", None))()


# files


def test_any_user_can_use_the_files_whatever_the_umask(place):
    before = os.umask(0o077)
    try:
        try_claim(place, claim("a"), IDLE).close()
        enter(place, claim("a")).leave()
    finally:
        os.umask(before)
    assert stat.S_IMODE(place.stat().st_mode) == 0o1777
    files = sorted(place.iterdir())
    assert [path.name for path in files] == ["gpu-a", "mutex", "ticket-0"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o1666}


@pytest.fixture
def public_folder():
    """A folder that other users can enter; those of pytest are private."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        os.chmod(path, 0o755)
        yield Path(path)


def test_a_process_that_is_killed_leaves_no_file_that_others_cannot_use(place, monkeypatch):
    """Whenever it is killed, what is there has its final mode: nothing is changed afterwards."""
    monkeypatch.setattr(os, "fchmod", lambda *arguments: pytest.fail("a chmod after the creation"))
    monkeypatch.setattr(os, "chmod", os.fchmod)
    monkeypatch.setenv(shared_files.VARIABLE, str(place / "new"))
    before = os.umask(0o077)
    try:
        found = folder()
        close(try_lock(found / "gpu-a"))
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(before)
    assert stat.S_IMODE(found.stat().st_mode) == 0o1777
    assert [path.name for path in found.iterdir()] == ["gpu-a"]  # no draft
    assert stat.S_IMODE((found / "gpu-a").stat().st_mode) == 0o1666


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_a_directory_that_docker_created_for_root_is_opened_by_root(monkeypatch, public_folder):
    monkeypatch.delenv(shared_files.VARIABLE)
    monkeypatch.setattr(shared_files, "_PARENTS", (str(public_folder),))
    path = public_folder / shared_files._NAME
    path.mkdir(mode=0o755)

    def as_nobody():
        os.setuid(NOBODY)
        with pytest.raises(ConfigError, match=f"denied; its owner can: chmod 1777 {path}; DIST"):
            try_claim(folder(), claim("a"), IDLE)

    Child(as_nobody).kill()
    assert folder() == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o1777


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_two_users_share_leases_and_queue(monkeypatch, public_folder):
    monkeypatch.setenv(shared_files.VARIABLE, str(public_folder / "leases"))
    place = folder()
    try_claim(place, claim("a"), IDLE).close()
    enter(place, claim("a")).leave()

    def as_nobody():
        os.setuid(NOBODY)
        found = try_claim(place, own_claim("theirs", ["a"], count=1, nice=False), IDLE)
        enter(place, claim("ab"))
        return got(found)

    other = Child(as_nobody)
    assert other.result == "a"
    with mutex(place):
        assert holders(place, ["a"])["a"].run == "theirs"
    other.kill()
    found = try_claim(place, claim("a"), IDLE)
    assert got(found) == "a"
    found.close()


def test_a_file_that_is_removed_while_it_is_locked_is_not_taken_for_the_lock(place, monkeypatch):
    open_shared, removed = shared_files.open_shared, []

    def remove_once(path):
        fd = open_shared(path)
        if not removed:
            removed.append(path.unlink())
        return fd

    monkeypatch.setattr(shared_files, "open_shared", remove_once)
    fd = try_lock(place / "gpu-a")
    assert os.path.samestat(os.fstat(fd), (place / "gpu-a").stat())
    close(fd)


@pytest.mark.parametrize(
    "kind", ["link", "file", "not sticky", "pipe", "nowhere", "relative", "long"]
)
def test_a_directory_or_file_that_cannot_be_trusted_is_refused(tmp_path, monkeypatch, kind):
    path = tmp_path / "other"
    monkeypatch.setenv(shared_files.VARIABLE, str(path))
    match kind:
        case "link":
            path.symlink_to(tmp_path)
            expected = "expected a directory"
        case "file":
            path.write_text("")
            expected = "expected a directory"
        case "not sticky":
            path.mkdir()
            path.chmod(0o777)
            expected = "expected a sticky directory; its owner can: chmod 1777"
        case "pipe":
            os.mkfifo(folder() / "gpu-a")
            expected = "cannot be kept here: not a regular file"
        case "relative":
            monkeypatch.setenv(shared_files.VARIABLE, "leases")
            expected = "DISTRAIN_LEASES=leases: expected an absolute path"
        case "long":
            monkeypatch.setenv(shared_files.VARIABLE, f"/tmp/{'x' * 300}")
            expected = "cannot be kept here: File name too long"
        case "nowhere":
            monkeypatch.setenv(shared_files.VARIABLE, "/proc/leases")
            expected = "cannot be kept here: .*; DISTRAIN_LEASES=DIR names another.*launch.share"
    with pytest.raises(ConfigError, match=expected) as caught:
        try_claim(folder(), claim("a"), IDLE)
    assert "\n" not in str(caught.value)


def test_a_mutex_that_is_held_for_long_names_its_holder(place):
    def hold():
        entered.append(mutex(place))
        entered[0].__enter__()

    entered = []

    holder = Child(hold)
    with pytest.raises(ConfigError, match=f"the last one was {holder.pid}; if it is stopped"):
        queue.rivals(place, claim("a"), 0.1)
    holder.kill()
    try_claim(place, claim("a"), IDLE).close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Claim()),
        ("[" * 5000, Claim()),
        ("[1]", Claim()),
        ('{"pid": true, "since": "x", "gpus": 3, "nice": 1, "count": -1, "x": 0}', Claim()),
        ('{"run": "a\\u001b[31m\\n", "pid": 7}', Claim(run="a?[31m?", pid=7)),
        ('{"since": 1, "gpus": ["a", 2]}', Claim(since=1.0, gpus=("a", "2"))),
        ('{"since": 1e999, "number": 1e5}', Claim()),
    ],
)
def test_any_text_in_a_file_is_a_claim(tmp_path, text, expected):
    path = tmp_path / "file"
    path.write_text(text)
    assert claims.read(path) == expected


def test_a_claim_is_read_as_it_was_written(tmp_path):
    mine = own_claim("runs/a", ["GPU-1", "GPU-2"], count=1, nice=True)
    with (tmp_path / "file").open("w+b") as file:
        claims.write(file.fileno(), claim("abcdefgh" * 20))
        claims.write(file.fileno(), mine)
    assert claims.read(tmp_path / "file") == mine


# many runs


def arrivals(libraries, tmp_path, *arguments):
    (tmp_path / "machine").mkdir()
    env = os.environ | {
        shared_files.VARIABLE: str(tmp_path / "machine" / "leases"),
        "LD_LIBRARY_PATH": str((libraries / "new" / LIBRARY).parent),
        "NVML_STAND_IN": str(tmp_path / "machine" / "says"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, str(ARRIVALS), *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_thousand_arrivals_and_kills(libraries, tmp_path):
    found = arrivals(libraries, tmp_path, 1000, 1, "nothing")
    assert (found["two runs"], found["overtaken"]) == (0, 0), found
    assert found["left"] == found["failed ranks"] == []
    assert sum(found["ends"].values()) == 1000
    assert found["ends"].keys() <= {"0", "2", "75", "-9", "-15"}, found
    assert found["pairs"] > 100  # times at which one that waited could have been overtaken
    assert min(found["ends"]["0"], found["ends"]["-9"]) > 50


@pytest.mark.parametrize(("broken", "seen"), [("order", "overtaken"), ("locks", "two runs")])
def test_the_checks_see_what_they_look_for(libraries, tmp_path, broken, seen):
    assert arrivals(libraries, tmp_path, 150, 1, broken)[seen] > 0
