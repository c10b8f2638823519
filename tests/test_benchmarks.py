"""The benchmarks that `make bench` runs still run: their figures are another matter."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SCALING = """
from benchmarks import scaling
scaling.STEPS = 40
print("cost", scaling.one_rank_of(64, lambda: scaling.loop_cost(30)).cpu_s)
"""
OVERHEAD = """
from benchmarks import overhead
case = overhead.CASES[2]._replace(in_a_row=40)
alone = overhead.measure(case, 0.1, 1e9).rounds, overhead.slow_ratio(case)
for rounds, slow_ratio in alone, overhead.measure_on_two_ranks(case, 1):
    print("rounds", len(rounds), len(overhead.describe(case, rounds, slow_ratio)))
"""


def run(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_the_cost_of_one_rank_of_many() -> None:
    [cost] = [line.split()[1] for line in run(SCALING) if line.startswith("cost ")]
    assert 0 < float(cost) < 1


@pytest.mark.slow
def test_turns_with_a_bare_loop() -> None:
    assert run(OVERHEAD)[-2:] == ["rounds 3 10", "rounds 1 10"]


@pytest.mark.slow
def test_options() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.options", "--rounds", "1", "--only", "static_graph"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("| static_graph: true")]
