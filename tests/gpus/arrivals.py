"""Runs that arrive at random on a machine of four GPUs, some of which are killed at random.

A program, so that its forks are small: it loads no torch. NVML is the stand-in of the tests. Each
run is a process that leases GPUs as the launcher does and forks a rank, which may outlive it. The
checks use other means than the code under test:

* a POSIX record lock per GPU, which the kernel ends with its process: a second run finds it taken;
* a log of what is written to tickets and leases, under the mutex: its order is that of the queue.

Prints as JSON what was wrong, and counts.
"""

import contextlib
import fcntl
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from distrain.errors import ConfigError, StoppedBeforeStart
from distrain.gpus import claim as claims
from distrain.gpus import leases, queue, shared_files
from distrain.launch import gpus as launcher
from distrain.launch.gpus import GpuRequest, lease
from distrain.launch.stop import StopRequest

NUM_GPUS = 4
MOST_AT_ONCE = 8
FOLDER = Path(os.environ[shared_files.VARIABLE])
LOG = os.open(FOLDER.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def log(**event):
    os.write(LOG, (json.dumps(event) + "\n").encode())  # whole lines: O_APPEND


def say_driver():
    lines = [f"gpus {NUM_GPUS}"]
    for gpu in range(NUM_GPUS):
        lines += [f"{gpu}.uuid GPU-{gpu}", f"{gpu}.name Card"]
        lines += [f"{gpu}.memory_total {80 * 2**30}", f"{gpu}.memory_used {2**28}"]
    Path(os.environ["NVML_STAND_IN"]).write_text("\n".join(lines) + "\n")


def log_writes():
    """Log each claim that is written to a ticket or a lease."""
    write = claims.write

    def logged(fd, claim):
        write(fd, claim)
        file = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        log(event=file.partition("-")[0], pid=os.getpid(), nice=claim.nice, gpus=claim.gpus,
            number=claim.number)  # fmt: skip

    claims.write = logged


def occupy(checks, uuids):
    """Lock the records of GPUs; log the GPUs at which another run is found."""
    for uuid in uuids:
        try:
            fcntl.lockf(checks[uuid], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            log(event="two runs", gpu=uuid, pid=os.getpid())
        fcntl.lockf(checks[uuid], fcntl.LOCK_SH | fcntl.LOCK_NB)  # its ranks do so, too


def open_checks():
    # before the leases: the kernel closes the files of a killed process in their order
    return {
        f"GPU-{gpu}": os.open(FOLDER.parent / f"check-{gpu}", os.O_RDWR | os.O_CREAT)
        for gpu in range(NUM_GPUS)
    }


def be_rank(checks, paths, uuids, parent, ready, hold_s):
    try:
        leases.hold(paths)
    except BaseException as error:
        log(event="a rank failed", pid=os.getpid(), error=str(error))
        os._exit(1)
    os.write(ready, b".")
    if os.getppid() == parent:  # else the leases may have ended before this rank held them
        for uuid in uuids:
            try:
                fcntl.lockf(checks[uuid], fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                log(event="two runs", gpu=uuid, pid=os.getpid())
        time.sleep(hold_s)
    os._exit(0)


def be_run(*, ranks, visible, wait, nice, hold_s, outlived_s):
    checks = open_checks()
    os.environ["CUDA_VISIBLE_DEVICES"] = visible
    request = GpuRequest(ranks, f"run-{os.getpid()}", wait=wait, nice=nice)
    with StopRequest(is_quiet=True) as stop, lease(request, stop) as grant:
        assert len(grant.gpus) == ranks
        uuids = [gpu.uuid for gpu in grant.gpus]
        occupy(checks, uuids)
        read, ready = os.pipe()
        parent, rank = os.getpid(), os.fork()
        if not rank:
            be_rank(checks, grant.leases.paths, uuids, parent, ready, hold_s + outlived_s)
        os.close(ready)
        os.read(read, 1)  # a launcher does not end before its ranks have begun
        time.sleep(hold_s)
        if not outlived_s:
            os.waitpid(rank, 0)
        for uuid in uuids:  # before the lease ends
            fcntl.lockf(checks[uuid], fcntl.LOCK_UN)


def start(draw):
    """Fork a run; return its process id."""
    visible = draw.sample(range(NUM_GPUS), draw.randint(1, NUM_GPUS))
    settings = {
        "ranks": draw.randint(1, len(visible)),
        "visible": ",".join(map(str, visible)),
        "wait": draw.random() < 0.8,
        "nice": draw.random() < 0.25,
        "hold_s": draw.random() * 0.008,
        "outlived_s": draw.choice([0, 0, 0.01]),
    }
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        be_run(**settings)
        code = 0
    except ConfigError as error:
        code = 2 if "expected" in str(error) and not settings["wait"] else 1
    except StoppedBeforeStart:
        code = 75
    finally:
        if code == 1:
            sys.excepthook(*sys.exc_info())
        os._exit(code)


def arrive(num_runs, seed):
    """Start runs, kill and stop some; return how they ended, by exit code."""
    draw = random.Random(seed)
    alive, ends, started = set(), {}, 0
    while started < num_runs or alive:
        if started < num_runs and len(alive) < MOST_AT_ONCE and draw.random() < 0.7:
            alive.add(start(draw))
            started += 1
        if alive and draw.random() < 0.03:
            pid = draw.choice(sorted(alive))
            # before: from now on nothing has to wait for it
            log(event="end", pid=pid)
            os.kill(pid, draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        pid, status = os.waitpid(-1, os.WNOHANG) if alive else (0, 0)
        if pid:
            alive.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            ends[code] = ends.get(code, 0) + 1
        else:
            time.sleep(0.001)
    return ends


def overtaken(events):
    """Return where a run took a GPU for which another one waited that was before it."""
    waiting, ended, found, num_checked = {}, set(), [], 0
    for event in events:
        if event["event"] == "ticket" and event["pid"] not in ended:
            waiting[event["pid"]] = event
        elif event["event"] == "end":
            ended.add(event["pid"])
            waiting.pop(event["pid"], None)
        elif event["event"] == "gpu":
            waiting.pop(event["pid"], None)
            number = event["number"] or float("inf")
            for other in waiting.values():
                if {*other["gpus"]} & {*event["gpus"]}:
                    num_checked += 1
                    if (other["nice"], other["number"]) < (event["nice"], number):
                        found.append((other, event))
    return found, num_checked


def break_it(what):
    """Take a guard away: the checks have to notice."""
    if what == "order":
        queue._order = lambda claim: (claim.nice, -claim.number)
    elif what == "locks":
        queue.holders = lambda folder, uuids: {}
        leases.try_lock = lambda path, kind=0: shared_files.open_shared(path)
        leases.share = leases.close = lambda fd: None


def main():
    num_runs, seed, broken = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    launcher.POLL_S, launcher._RETRY_S = 0.01, 0.002
    say_driver()
    log_writes()
    break_it(broken)
    errors = FOLDER.parent / "errors"
    with errors.open("a", buffering=1) as file, contextlib.redirect_stderr(file):
        ends = arrive(num_runs, seed)
    deadline_s = time.monotonic() + 60  # the last ranks may have outlived their commands
    while True:
        with shared_files.mutex(FOLDER):
            held = leases.holders(FOLDER, [f"GPU-{gpu}" for gpu in range(NUM_GPUS)])
            waiting = queue.waiting(FOLDER)
        if not held or time.monotonic() > deadline_s:
            break
        time.sleep(0.01)
    events = [json.loads(line) for line in (FOLDER.parent / "log").read_text().splitlines()]
    before, num_checked = overtaken(events)
    result = {
        "ends": ends,
        "two runs": len([event for event in events if event["event"] == "two runs"]),
        "failed ranks": [event for event in events if event["event"] == "a rank failed"],
        "overtaken": len(before),
        "pairs": num_checked,
        "taken": len([event for event in events if event["event"] == "gpu"]),
        "left": [*held, *(claim.run for claim in waiting)],
    }
    if 1 in ends:
        result["errors"] = errors.read_text()[-2000:]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
