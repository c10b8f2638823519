"""Mirror process: uploads and downloads checkpoints; training never waits for a store.

Started by `mirror` with a task as JSON, see `main`. It writes one event per line, as JSON,
on its standard output. It ends when its standard input does, or the training process: an upload
that is cut off has no manifest. Without torch: it starts in a second.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from distrain.checkpoint.writer_process import IGNORED_SIGNALS, NICE

LOOK_S = 1.0  # between looks at the local folder
MAX_BACKOFF_S = 60.0  # between attempts, and between starts of a process that dies
MAX_LAST_BACKOFF_S = 5.0  # while the end of the run waits
FETCH_TRIES = 3

_lock = threading.Lock()
_events_fd = 1


def report(event: dict[str, Any]) -> None:
    """Write an event for the training process."""
    with _lock:
        try:
            os.write(_events_fd, json.dumps(event).encode() + b"\n")
        except BrokenPipeError:
            os._exit(1)


def follow(task: dict[str, Any], finish: threading.Event) -> None:
    """Mirror a local folder until the process ends; after `finish`, until nothing is left."""
    from distrain.checkpoint.mirror_store import Place, one_line
    from distrain.checkpoint.mirror_upload import OtherRun, Uploader

    uploader, num_failures = None, 0
    while True:
        # read before the step: a checkpoint published after it needs another step
        is_last = finish.is_set()
        try:
            if uploader is None:
                place = Place(task["url"])
                uploader = Uploader(
                    place, task["folder"], keep=task["keep"], old=task["old"], report=report
                )
            elif num_failures:
                # the files of the store's library may have new credentials
                uploader.reconnect(Place(task["url"]))
            is_done = uploader.step()
        except OtherRun as error:
            if uploader is not None:
                uploader.failed(str(error))
            report({"event": "refused", "why": str(error)})
            return
        except Exception as error:
            num_failures += 1
            why = str(error) if isinstance(error, OSError) else one_line(error)
            if uploader is not None:
                uploader.failed(why)
            limit_s = MAX_LAST_BACKOFF_S if is_last else MAX_BACKOFF_S
            wait_s = min(2.0 ** (num_failures - 1), limit_s)
            report({"event": "failed", "why": why, "number": num_failures, "retry_s": wait_s})
            if is_last:
                time.sleep(wait_s)
            else:
                finish.wait(wait_s)
            continue
        if num_failures:
            report({"event": "recovered", "number": num_failures})
            num_failures = 0
        if is_done and is_last:
            report({"event": "settled"})
            return
        if is_done:
            finish.wait(LOOK_S)


def fetch_newest(task: dict[str, Any], go: threading.Event) -> None:
    """Report the checkpoints of a mirror; after `go`, download its newest valid one."""
    from distrain.checkpoint.mirror_fetch import fetch
    from distrain.checkpoint.mirror_store import RUN_FILE, Place, StoreError, one_line
    from distrain.checkpoint.mirror_upload import OtherRun, refuse_other, refuse_run_folder

    for number in range(1, FETCH_TRIES + 1):
        try:
            refuse_run_folder(task["url"])
            place = Place(task["url"])
            there = place.checkpoints()
            refuse_other(there, task["run_id"], place.url)
            if not go.is_set():
                newer = [each.iteration for each in there if each.iteration > task["newer_than"]]
                num = sum(not each.is_half for each in there)
                run_yaml = (place.read(RUN_FILE) or b"").decode(errors="replace")
                report(
                    {
                        "event": "found",
                        "newer": newer,
                        "num": num,
                        "run_yaml": run_yaml,
                    }
                )
                go.wait()
            name = fetch(place, there, task["folder"], newer_than=task["newer_than"], report=report)
            report({"event": "fetched", "name": name})
            return
        except OtherRun as error:
            report({"event": "refused", "why": str(error)})
            return
        except Exception as error:
            why = str(error) if isinstance(error, OSError) else one_line(error)
            if isinstance(error, OSError) and type(error) is not StoreError:
                report({"event": "unwritable", "why": why})
                return
            is_last = number == FETCH_TRIES
            report({"event": "unreadable" if is_last else "progress", "why": why})
            if not is_last:
                time.sleep(2.0 ** (number - 1))


def _or_exit(
    work: Callable[[dict[str, Any], threading.Event], None],
    task: dict[str, Any],
    signalled: threading.Event,
) -> None:
    """Carry out a task; an error that it does not handle, as of an import, ends the process."""
    try:
        work(task, signalled)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
        sys.stderr.flush()
        os._exit(1)


def main(arguments: list[str]) -> None:
    """Carry out a task in a thread; each line of the input is the signal to go on, or to finish.

    Args:
        arguments: one JSON object: "work" (follow or fetch), "parent" (process id), "url",
            "folder", "keep" and "old" (follow), "newer_than" and "run_id" (fetch), see `Uploader`
            and `fetch`.
    """
    global _events_fd
    _events_fd = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no event
    for number in IGNORED_SIGNALS:  # launchers and SLURM signal all processes of a job
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)
    os.nice(NICE)
    task = json.loads(arguments[0])
    work = {"follow": follow, "fetch": fetch_newest}[task["work"]]
    signalled = threading.Event()
    threading.Thread(target=_or_exit, args=(work, task, signalled), daemon=True).start()
    while True:
        # forked loader workers may hold the pipe open after the parent died
        if select.select([0], [], [], 1.0)[0]:
            if not os.read(0, 1 << 10):
                break
            signalled.set()
        if os.getppid() != task["parent"]:
            break
    sys.stderr.flush()
    os._exit(0)  # not held up by an upload
