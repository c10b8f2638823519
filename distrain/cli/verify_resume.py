"""Whether the user's own experiment resumes bit for bit.

`python -m distrain.checkpoint --verify-resume +experiment=x` trains it in temporary folders,
straight and interrupted half way, each start in a new process, and compares the last checkpoints.
Where they differ, a second straight run tells a state that is not complete from a training that is
never twice the same.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from distrain.cli.checkpoint_table import differing, print_comparison, the_checkpoint
from distrain.errors import ExitCode
from distrain.files.temp_folder import TemporaryFolder
from distrain.trainer.hook import HookBase

_HOOK = "+hooks.verify_resume"


class StopAt(HookBase):
    """Stops a run with exit code 75 after exactly `at` iterations, unless it was resumed there.

    Args:
        at: how many iterations; 0 never stops.
    """

    order = 85

    def __init__(self, at: int) -> None:
        self._at = at

    def after_step(self) -> None:
        """Stop if it is time: every rank knows, so nobody needs to agree."""
        if self.trainer.iter_done == self._at:
            from distrain.events.reduction import STOP_REQUESTED  # imports torch

            self.trainer.reduction.stop = STOP_REQUESTED


class _Plan(NamedTuple):
    """What is run: the arguments of the command, iterations in all and until the interruption."""

    arguments: list[str]
    iterations: int
    stop_at: int


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the options; what it does not know is for the command."""
    parser = argparse.ArgumentParser(
        prog="python -m distrain.checkpoint --verify-resume",
        usage="%(prog)s [--iterations N] [--stop-at K] +experiment=x [key=value ...]",
        description="Train an experiment straight and interrupted, in temporary folders, and say "
        "whether both end with the same bits. All further arguments are those of "
        "`python -m distrain`.",
        epilog="Exit status: 0 bit-identical, 1 different, 2 a run did not work.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--iterations", type=int, default=40, metavar="N", help="of each run (default: 40)"
    )
    parser.add_argument(
        "--stop-at", type=int, metavar="K", help="of the interruption (default: N // 2 - 1)"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Do what the command line asks for and return the exit status.

    Args:
        arguments: the command line, without `--verify-resume`.
    """
    parser = build_parser()
    options, overrides = parser.parse_known_args(arguments)
    if options.iterations < 2:
        parser.error(f"--iterations {options.iterations}: at least 2 are needed")
    stop_at = options.stop_at or max(1, options.iterations // 2 - 1)  # seldom at a window's end
    if not 0 < stop_at < options.iterations:
        parser.error(f"--stop-at {stop_at}: between 1 and {options.iterations - 1}, please")
    plan = _Plan(overrides, options.iterations, stop_at)
    with TemporaryFolder("verify-") as folder:
        return _verify(plan, Path(folder))


def _verify(plan: _Plan, folder: Path) -> int:
    """Run both ways, print the comparison, and say what it means.

    Raises:
        NothingFound: the experiment saves nothing.
    """
    whole, broken = folder / "straight", folder / "interrupted"
    if not _start(plan, whole, stop_at=0, expected=ExitCode.FINISHED):
        return 2
    left = the_checkpoint(whole, iteration=plan.iterations)  # without one nothing can be resumed
    for expected in (ExitCode.STOPPED, ExitCode.FINISHED):
        if not _start(plan, broken, stop_at=plan.stop_at, expected=expected):
            return 2
    right = the_checkpoint(broken, iteration=plan.iterations)
    print_comparison(left, right, names=("straight", "interrupted"))
    parts = differing(left, right)
    how = f"{plan.iterations} iterations straight, and {plan.stop_at} + the rest"
    if not parts:
        print(f"resume is bit-identical ({how}, on ranks: {left.world_size})")
        return 0
    print(f"resume is NOT bit-identical ({how}): {', '.join(parts)}")
    again = folder / "again"
    if _start(plan, again, stop_at=0, expected=ExitCode.FINISHED):
        second = the_checkpoint(again, iteration=plan.iterations)
        if random := differing(left, second):
            print(f"two straight runs differ as well, in {', '.join(random)}: this training is not")
            print("deterministic. Look for unseeded random numbers, data.seed_samples=false with")
            print("augmentation, and (on GPUs) for trainer.deterministic=true.")
        else:
            print("two straight runs are equal, so something is not part of the checkpoint: state")
            print("of a hook belongs in its state_dict, state of the model in its buffers.")
    return 1


def _start(plan: _Plan, run: Path, *, stop_at: int, expected: ExitCode) -> bool:
    """Start the command once; False, with what it has printed, if it ends in another way."""
    command = [
        *(sys.executable, "-m", "distrain", *plan.arguments, f"run.dir={run}", "resume=auto"),
        *(
            f"trainer.max_iter={plan.iterations}",
            f"{_HOOK}._target_=distrain.cli.verify_resume.StopAt",
        ),
        f"{_HOOK}.at={stop_at}",
    ]
    what = {0: "train straight", 75: f"stop after {stop_at}"}[int(expected)]
    is_resumed = expected == ExitCode.FINISHED and stop_at
    print(f"{run.name}: {'resume' if is_resumed else what} ...", file=sys.stderr, flush=True)
    code, output = run_command(command)
    if code == expected:
        return True
    print(output, file=sys.stderr)
    print(f"{run.name}: exit code {code}, not {int(expected)}; see above", file=sys.stderr)
    return False


def run_command(command: Sequence[str]) -> tuple[int, str]:
    """Run a command; return its exit code and what it has printed."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    return done.returncode, done.stdout
