"""trainer.max_time: all ranks stop after one iteration, by the clock of rank 0, and continue."""

import itertools
from types import SimpleNamespace

import pytest
from ranks import run_ranks
from resume_cases import conf_of, differing, state_of, train

from distrain.errors import ExitCode
from distrain.trainer import time_limit

ITERS = 60


def stopped_by_time_and_straight(rank, folder):
    # a second per step on rank 0; the clock of others does not count
    ticks = itertools.count() if rank == 0 else itertools.repeat(1e9)
    time_limit.time = SimpleNamespace(monotonic=lambda: next(ticks))
    code, seen = train(conf_of(iters=ITERS, max_time="10s", workers=2), folder / "broken")
    assert code == ExitCode.STOPPED
    assert 10 <= len(seen) < ITERS - 20
    code, rest = train(conf_of(iters=ITERS, max_time="2h30m", workers=2), folder / "broken")
    assert code == ExitCode.FINISHED
    assert [*seen, *rest] == [*range(ITERS)]
    assert train(conf_of(iters=ITERS), folder / "whole")[0] == ExitCode.FINISHED
    states = [state_of(folder / name, ITERS) for name in ("broken", "whole")] if rank == 0 else None
    return len(seen), states


@pytest.mark.usefixtures("short_windows")
def test_a_time_limit_stops_all_ranks_and_the_run_continues_bit_for_bit(tmp_path):
    (stopped_at, states), (other, _) = run_ranks(stopped_by_time_and_straight, 2, tmp_path)
    assert stopped_at == other
    assert not differing(*states)
