"""Two ranks over NCCL, on a GPU each; or both on one, which NCCL takes for GPUs of two hosts."""

import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from fsdp_cases import against_ddp, check_against_ddp
from test_one_gpu import Net, batches, fresh
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from benchmarks.gpu import ForbidsSynchronisation
from benchmarks.ours import default_hooks
from distrain import HookBase, Trainer, get_event_storage
from distrain.checkpoint.store import CheckpointStore
from distrain.distributed.ddp import DDP
from distrain.distributed.ranks import process_group
from distrain.distributed.sync_batchnorm import convert_sync_batchnorm
from distrain.events import reduction
from distrain.hooks import CallbackHook, PeriodicCheckpointer, ReplicaGuard
from distrain.optim.optimizer import build_optimizer
from distrain.trainer.numerics import numerics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.ranks,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
WORLD_SIZE = 2


def plain_ddp(data, *, precision="fp32"):
    """Return the weights after each batch has been trained on once."""
    model, optimizer = fresh()
    ddp = DistributedDataParallel(
        model, device_ids=[torch.cuda.current_device()], gradient_as_bucket_view=True
    )
    for x, y in data:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            loss = ddp(x.cuda(), y.cuda())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def against_plain_ddp(rank, folder):
    """Return for each precision the names of the tensors that differ, of all there are."""
    different = {}
    for precision in ("fp32", "bf16"):
        data = batches(20, size=8, seed=rank)
        torch.manual_seed(rank)  # what dropout draws begins alike in both, see `fresh`
        expected = plain_ddp(data, precision=precision)
        model, optimizer = fresh()
        Trainer(model, optimizer, data, precision=precision).train(0, len(data))
        found = model.state_dict()
        assert found.keys() == expected.keys()
        different[precision] = [n for n in found if not torch.equal(found[n], expected[n])]
    return different


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
    ).double()


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, y):
        return nn.functional.cross_entropy(self.net(x.double()), y)


def with_sync_batchnorm(rank, folder):
    """Return the state after training on this rank's halves, and that of one GPU on the whole."""
    whole = batches(20, size=8, seed=9)
    half = slice(4 * rank, 4 * rank + 4)
    model = convert_sync_batchnorm(Loss().cuda())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    Trainer(model, optimizer, [(x[half], y[half]) for x, y in whole]).train(0, len(whole))
    plain = Loss().cuda()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for x, y in whole:
        plain(x.cuda(), y.cuda()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), plain.state_dict()


class PutsRank(HookBase):
    """Puts a tensor of the device that says which rank put it."""

    def before_train(self):
        self.value = torch.full((), float(self.trainer.where.rank), device=self.trainer.device)

    def after_step(self):
        get_event_storage().put_scalar("rank", self.value)


def without_waiting(rank, folder):
    """Train with all default hooks where waiting for the device raises; return the rows."""
    model, optimizer = fresh()
    hooks = default_hooks(optimizer, folder / "rows")
    hooks |= {"puts": PutsRank(), "forbids": ForbidsSynchronisation()}
    hooks["guard"] = ReplicaGuard(10)
    data = batches(20, size=8, seed=rank)
    trainer = Trainer(model, optimizer, data, hooks=hooks, window=5, clip_norm=1.0)
    try:
        trainer.train(0, 200)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if rank:
        return None
    lines = (folder / "rows" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def resumed(rank, folder):
    """Return the names of the tensors in which a run that was resumed differs from a straight."""

    def leg(place, *, stop, resume=0):
        torch.manual_seed(5)
        model = Net().cuda()
        optimizer = build_optimizer(model, target="torch.optim.AdamW", lr=1e-3, weight_decay=0.1)
        store = CheckpointStore(folder / place)
        hooks = [PeriodicCheckpointer(4, checkpoints=store), ReplicaGuard(3)]
        hooks += [CallbackHook(before_step=lambda t: torch.manual_seed(100 * t.iter + rank))]
        data = batches(stop, seed=rank)[resume:]
        trainer = Trainer(model, optimizer, data, hooks=hooks, strategy=DDP(comm_hook="bf16"))
        if resume:
            trainer.load_state_dict(store.load(resume))
        trainer.train(resume, stop)
        return trainer.state_dict()

    straight = leg("straight", stop=10)
    leg("broken", stop=8)
    again = leg("broken", stop=10, resume=8)
    names = [n for n, v in straight["model"].items() if not torch.equal(v, again["model"][n])]
    moments = again["optimizer"]["state"]
    for number, state in straight["optimizer"]["state"].items():
        names += [
            f"{number}.{k}" for k, v in state.items() if not torch.equal(v, moments[number][k])
        ]
    return names


CHECKS = (against_plain_ddp, with_sync_batchnorm, against_ddp, without_waiting, resumed)


def be_rank(rank, port, shares_gpu, folder, pipe):
    """Do all checks as one of the ranks; send what each returned."""
    local_rank = 0 if shares_gpu else rank
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(WORLD_SIZE),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if shares_gpu:
        os.environ |= {"NCCL_HOSTID": str(rank), "NCCL_SOCKET_IFNAME": "lo"}
    reduction._TARGET_WINDOW_S = 0.0  # each window of 5 steps travels by itself
    with process_group(timeout_s=120), numerics(deterministic=True, float32_matmul=None):
        for check in CHECKS:
            place = Path(folder, check.__name__)
            place.mkdir(exist_ok=True)
            result = tree_map_only(torch.Tensor, lambda t: t.cpu(), check(rank, place))
            pipe.send((check.__name__, result))
    pipe.close()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return by name what each check returned on each rank: one start for all of them."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shares_gpu = torch.cuda.device_count() < WORLD_SIZE
    pipes = [spawn.Pipe(duplex=False) for _ in range(WORLD_SIZE)]
    processes = [
        spawn.Process(target=be_rank, args=(rank, port, shares_gpu, str(folder), write))
        for rank, (_, write) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    found = {check.__name__: [] for check in CHECKS}
    try:
        for read, write in pipes:
            write.close()
            for _ in CHECKS:
                if not read.poll(200):
                    break
                try:
                    name, result = read.recv()
                except EOFError:  # the rank has said why on stderr
                    break
                found[name].append(result)
    finally:
        for process in processes:
            process.join(20)
            process.kill()
            process.join()
    return found


def of_both(results, name):
    assert len(results[name]) == WORLD_SIZE, "a rank failed; see its stderr"
    return results[name]


def test_ranks_equal_plain_ddp_bit_for_bit(results):
    for different in of_both(results, "against_plain_ddp"):
        assert different == {"fp32": [], "bf16": []}


def test_sync_batchnorm_over_two_halves_is_batchnorm_over_the_whole(results):
    for synced, plain in of_both(results, "with_sync_batchnorm"):
        torch.testing.assert_close(synced, plain, rtol=1e-9, atol=1e-10)


def test_sharded_equals_ddp_resumes_and_changes_strategy(results):
    check_against_ddp(of_both(results, "against_ddp"))


def test_an_ordinary_step_waits_for_nothing_and_scalars_are_of_both(results):
    rows, _ = of_both(results, "without_waiting")
    assert [row["iteration"] for row in rows if "rank" in row] == [*range(4, 200, 5)]
    assert {row["rank"] for row in rows if "rank" in row} == {0.5}


def test_compressed_gradients_resume_bit_for_bit(results):
    assert of_both(results, "resumed") == [[], []]
