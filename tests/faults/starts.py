"""Stop starts of many ranks under load at random moments: each must end within its grace time.

    python tests/faults/starts.py --starts 50 --ranks 8 --load 20

Each start gets a SIGTERM after a random time and has `launch.grace_s`, and MARGIN_S more on a
machine that is busy, to leave. It ends as one of `OUTCOMES`; one that is still there hangs: its
processes are aborted then, so that each writes its stacks to the start's log, which is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from runner import Runner, find_all

MARGIN_S = 30.0
LATEST_S = 40.0  # of the SIGTERM, from the start on
OUTCOMES = (
    "not begun",  # the signal came before the command listened
    "stopped",  # 75, with a checkpoint
    "killed",  # by the agent, after the grace time
    "hangs",
    "wrong",
)


def stopped_start(
    folder: Path, *, ranks: int, grace_s: float, after_s: float
) -> tuple[str, float, str]:
    """Start a run, ask it to stop; return its outcome, seconds from the signal to the end, its log.

    Args:
        folder: to be made, for all that the start writes.
        ranks: how many.
        grace_s: that the launcher gives them.
        after_s: from the start to the signal.
    """
    runner = Runner(folder, iterations=1_000_000)
    settings = [f"launch.ranks={ranks}", f"launch.grace_s={grace_s}", "data.workers=0"]
    with runner.started(settings, PYTHONFAULTHANDLER="1") as command:
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.wait(after_s)
        begin = time.monotonic()
        command.send_signal(signal.SIGTERM)
        try:
            code = command.wait(grace_s + MARGIN_S)
        except subprocess.TimeoutExpired:
            return "hangs", time.monotonic() - begin, _stacks(runner)
        seconds = time.monotonic() - begin
        log, left = runner.log(), runner.processes()
        is_saved = bool(find_all(runner.run / "checkpoints"))
    if code == 75 and is_saved:
        return "stopped", seconds, log
    if code == -signal.SIGTERM and not runner.run.joinpath("logs").exists():
        return "not begun", seconds, log
    if code == 1 and "had not stopped after launch.grace_s" in log and not left:
        return "killed", seconds, log
    return "wrong", seconds, f"exit {code}, processes {left}\n{log}"


def _stacks(runner: Runner) -> str:
    """Have every process of a start write its stacks; return the log."""
    roles = runner.processes()
    for pid in roles:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGABRT)
    time.sleep(5.0)
    logs = sorted((runner.run / "logs").glob("*"))
    return "\n".join([str(roles), runner.log(), *(path.read_text() for path in logs)])


@contextlib.contextmanager
def load(loops: int) -> Iterator[None]:
    """Keep the CPUs busy inside `with` by so many processes."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Stop starts as the command line says; 1 if one hung or ended as none should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--load", type=int, default=20, help="busy processes alongside")
    parser.add_argument("--grace", type=float, default=30.0, help="launch.grace_s")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, load(options.load):
        for number in range(options.starts):
            after_s = rng.uniform(0.0, LATEST_S)
            outcome, seconds, log = stopped_start(
                Path(folder, str(number)),
                ranks=options.ranks,
                grace_s=options.grace,
                after_s=after_s,
            )
            counts[outcome] += 1
            print(f"{number}: SIGTERM at {after_s:.1f} s: {outcome} {seconds:.1f} s later")
            if outcome in ("hangs", "wrong"):
                print(log)
            sys.stdout.flush()
    print(", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES))
    return int(counts["hangs"] + counts["wrong"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
