"""`python -m distrain.checkpoint`: list, verify and compare the checkpoints of runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distrain.cli.checkpoint_table import NothingFound, compare, show
from distrain.process.stdio import for_reader

VERIFY = "--verify-resume"


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="python -m distrain.checkpoint",
        description="List and verify the checkpoints of a run, or compare those of two runs; with "
        "--verify-resume, test whether an experiment resumes bit for bit.",
        epilog="Exit status: 0 valid (and equal), 1 damaged or different, 2 no checkpoint.",
        allow_abbrev=False,  # `main` looks for --verify-resume as a whole
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, such as runs/first")
    parser.add_argument(
        "other", type=Path, metavar="RUN2", nargs="?", help="another run to compare with"
    )
    parser.add_argument(
        "--iteration",
        type=int,
        metavar="N",
        help="show or compare the digests of this iteration (default: the newest valid one)",
    )
    parser.add_argument(
        VERIFY,
        action="store_true",
        help="instead of RUN, take the arguments of `python -m distrain`, train straight and "
        f"interrupted, and compare; see `{VERIFY} --help`",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # terminals without "≠"
    return for_reader(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> int:
    try:
        if VERIFY in arguments:
            from distrain.cli import verify_resume

            return verify_resume.main([each for each in arguments if each != VERIFY])
        options = build_parser().parse_args(arguments)
        if options.other is None:
            return show(options.run, iteration=options.iteration)
        return compare(options.run, options.other, iteration=options.iteration)
    except BrokenPipeError:  # see `for_reader`
        raise
    except (NothingFound, OSError) as error:
        print(error, file=sys.stderr)
        return 2
