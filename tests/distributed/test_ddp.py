"""The DDP strategy: the numbers of torch's own forward, a range under a profiler only."""

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distrain.distributed import DDP

pytestmark = pytest.mark.ranks

RANGE = "DistributedDataParallel.forward"


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


def wrapped(options):
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return DDP(options).wrap(module, optimizer, torch.device("cpu"))


def trained(ddp, rank):
    """Return the state after some steps, one of them without gradients and one unsynchronised."""
    g = torch.Generator().manual_seed(rank)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for step in range(5):
        x = torch.randn(6, 4, generator=g)
        with torch.no_grad():
            ddp(x)
        if step == 2:
            with ddp.no_sync():
                ddp(x).square().mean().backward()
        ddp(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return ddp.module.state_dict()


def against_torchs(rank, options):
    ours = wrapped(options)
    theirs = DistributedDataParallel(model(), gradient_as_bucket_view=True, **options)
    mine, other = trained(ours, rank), trained(theirs, rank)
    return all(torch.equal(mine[name], other[name]) for name in other)


@pytest.mark.parametrize(
    "options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str
)
def test_the_numbers_are_those_of_torchs_own_forward(options):
    assert run_ranks(against_torchs, 2, options) == [True, True]


def ranges(rank):
    """Return how many ranges a profiled forward opens, and which one that is not: ours, torch's."""
    ddp = wrapped({})
    with torch.profiler.profile() as profile:
        ddp(torch.ones(2, 4))
    seen = [event.count for event in profile.key_averages() if event.key == RANGE]
    opened = []
    record = torch.autograd.profiler.record_function
    torch.autograd.profiler.record_function = lambda name: opened.append(name) or record(name)
    ddp(torch.ones(2, 4))
    ours, opened[:] = [*opened], []
    DistributedDataParallel(model())(torch.ones(2, 4))
    return seen, ours, opened


def test_a_forward_opens_a_range_only_for_a_profiler():
    assert run_ranks(ranges, 2) == [([1], [], [RANGE])] * 2
