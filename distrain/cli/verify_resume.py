"""Verify that an experiment resumes bit for bit.

`python -m distrain.checkpoint --verify-resume +experiment=x` trains it in temporary folders,
straight and interrupted half way, each start in a new process, and compares the last checkpoints.
If they differ, a second straight run shows whether the training is deterministic at all.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from distrain.cli.checkpoint_table import differing, find_checkpoint, print_comparison
from distrain.errors import ExitCode
from distrain.files.temp_folder import TemporaryFolder

_HOOK = "+hooks.verify_resume"


class _Plan(NamedTuple):
    """Arguments of the command, its iterations, and those before the interruption."""

    arguments: list[str]
    iterations: int
    stop_at: int


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser; other arguments are for `python -m distrain`."""
    parser = argparse.ArgumentParser(
        prog="python -m distrain.checkpoint --verify-resume",
        usage="%(prog)s [--iterations N] [--stop-at K] +experiment=x [key=value ...]",
        description="Train an experiment straight and interrupted, in temporary folders, and "
        "report whether both end with the same bits. All other arguments are those of "
        "`python -m distrain`.",
        epilog="Exit status: 0 bit-identical, 1 different, 2 a run failed.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--iterations",
        type=int,
        default=40,
        metavar="N",
        help="iterations of each run (default: 40)",
    )
    parser.add_argument(
        "--stop-at",
        type=int,
        metavar="K",
        help="iterations before the interruption (default: N // 2 - 1)",
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the command, without `--verify-resume` in its arguments; return its exit status."""
    parser = build_parser()
    options, overrides = parser.parse_known_args(arguments)
    if options.iterations < 2:
        parser.error(f"--iterations {options.iterations}: expected an integer >= 2")
    stop_at = options.stop_at
    if stop_at is None:
        stop_at = max(1, options.iterations // 2 - 1)  # rarely the end of a window
    if not 0 < stop_at < options.iterations:
        parser.error(f"--stop-at {stop_at}: expected 1 to {options.iterations - 1}")
    for argument in overrides:
        if argument in ("-m", "--multirun") or argument.lstrip("+") == "plan=true":
            parser.error(f"{argument}: expected the arguments of one run; leave it out")
    plan = _Plan(overrides, options.iterations, stop_at)
    with TemporaryFolder("verify-") as folder:
        return _verify(plan, Path(folder))


def _verify(plan: _Plan, folder: Path) -> int:
    """Run both ways; print the comparison and its meaning.

    Raises:
        NothingFound: the experiment saves no checkpoint.
    """
    whole, broken = folder / "straight", folder / "interrupted"
    if not _start(plan, whole, stop_at=0, expected=ExitCode.FINISHED):
        return 2
    left = find_checkpoint(whole, iteration=plan.iterations)
    for expected in (ExitCode.STOPPED, ExitCode.FINISHED):
        if not _start(plan, broken, stop_at=plan.stop_at, expected=expected):
            return 2
    right = find_checkpoint(broken, iteration=plan.iterations)
    print_comparison(left, right, names=("straight", "interrupted"))
    parts = differing(left, right)
    how = f"{plan.iterations} iterations straight, and {plan.stop_at} + the rest"
    if not parts:
        print(f"resume is bit-identical ({how}, on ranks: {left.world_size})")
        return 0
    print(f"resume is NOT bit-identical ({how}): {', '.join(parts)}")
    again = folder / "again"
    if _start(plan, again, stop_at=0, expected=ExitCode.FINISHED):
        second = find_checkpoint(again, iteration=plan.iterations)
        if random := differing(left, second):
            print(f"two straight runs differ as well, in {', '.join(random)}: this training is not")
            print("deterministic. Look for unseeded random numbers, data.seed_samples=false with")
            print("augmentation, and (on GPUs) for trainer.deterministic=true.")
        else:
            print("two straight runs are equal, so the checkpoint is incomplete: put the state of")
            print("a hook into its state_dict, and the state of the model into its buffers.")
    return 1


def _start(plan: _Plan, run: Path, *, stop_at: int, expected: ExitCode) -> bool:
    """Run the command once; return False and print its output if its exit code is another."""
    command = [
        *(sys.executable, "-m", "distrain", *plan.arguments, f"run.dir={run}", "resume=auto"),
        *(f"trainer.max_iter={plan.iterations}", "trainer.max_epochs=null"),
        "checkpoint.mirror=null",  # that of the experiment is not for trials
        f"{_HOOK}._target_=distrain.hooks.StopAt",
        f"{_HOOK}.iterations=[{stop_at or ''}]",
    ]
    action = "resume" if stop_at else "train straight"
    if expected == ExitCode.STOPPED:
        action = f"stop after {stop_at}"
    print(f"{run.name}: {action} ...", file=sys.stderr, flush=True)
    code, output = run_command(command)
    if code == expected:
        return True
    print(output, file=sys.stderr)
    print(f"{run.name}: exit code {code}, not {int(expected)}; see above", file=sys.stderr)
    return False


def run_command(command: Sequence[str]) -> tuple[int, str]:
    """Run a command; return its exit code and output."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    return done.returncode, done.stdout
