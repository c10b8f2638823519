"""One model trained by DDP and by FSDP, resumed with either, and compared."""

import pytest
import torch
import torch.distributed._composable.fsdp
import torch.distributed.fsdp
import torch.distributed.tensor
from checkpoint_cases import InlineStore
from torch import nn

from distrain import Trainer
from distrain.distributed.fsdp import is_sharded
from distrain.hooks import CallbackHook, PeriodicCheckpointer, ReplicaGuard
from distrain.optim.optimizer import build_optimizer


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(self.norm(x)).tanh()


class Model(nn.Module):
    """Its output weights are its input weights, as in a language model."""

    def __init__(self, width=8, depth=2):
        super().__init__()
        self.inside = nn.Linear(width, width, bias=False)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.outside = nn.Linear(width, width)
        self.outside.weight = self.inside.weight

    def forward(self, batch):
        return (self.outside(self.blocks(self.inside(batch))) - 1).square().mean()


class Data:
    """Batch i of rank r, wherever the stream starts."""

    samples_per_forward = 2

    def __init__(self, rank):
        self.rank = rank

    def batches(self, start_iter):
        iteration = 2 * start_iter  # two forwards in a step
        while True:
            g = torch.Generator().manual_seed(100 * iteration + self.rank)
            yield torch.randn(2, 8, generator=g, dtype=torch.float64)
            iteration += 1


def make(rank, strategy, hooks=(), target="torch.optim.AdamW", **settings):
    torch.manual_seed(0)
    model = Model().double()
    optimizer = build_optimizer(
        model, target=target, lr=0.05, weight_decay=0.1, weight_decay_norm=0.0, bias_lr_factor=2.0
    )
    settings = {"accumulation": 2, "clip_norm": 0.1, "window": 2} | settings
    return Trainer(model, optimizer, Data(rank), hooks=hooks, strategy=strategy, **settings)


def trained(rank, strategy, *, stop=6, folder=None, resume=None, **settings):
    """Return model, losses, norms and groups; resume from a checkpoint's iteration if given."""
    norms = []
    hooks = [CallbackHook(after_step=lambda t: norms.append(t.grad_norm)), ReplicaGuard(2)]
    if folder:
        store = InlineStore(folder)
        hooks.append(PeriodicCheckpointer(checkpoints=store))
    trainer = make(rank, strategy, hooks, **settings)
    if resume is not None:
        trainer.load_state_dict(store.load(resume))
    trainer.train(resume or 0, stop)
    state = trainer.state_dict()
    names = {p: n for n, p in trainer.module.named_parameters()}
    groups = [
        ([names[p] for p in g["params"]], g["lr"], g["weight_decay"])
        for g in trainer.optimizer.param_groups
    ]
    losses = [v for v, _ in trainer.storage.history("loss").values()]
    moments = state["optimizer"]["state"]
    return {**state["model"]}, moments, losses, norms, groups


def local_bytes(trainer):
    tensors = []
    for parameter in trainer.module.parameters():
        tensors += [parameter, parameter.grad, *trainer.optimizer.state[parameter].values()]
    mine = [t.to_local() if is_sharded(t) else t for t in tensors]
    return sum(t.numel() * t.itemsize for t in mine if t.dim())


def memory(rank, strategy):
    found = []
    hook = CallbackHook(after_step=lambda t: None)
    trainer = make(rank, strategy, [hook], accumulation=1)
    trainer.optimizer.zero_grad = lambda: found.append(local_bytes(trainer))
    trainer.train(0, 2)
    return found[-1]


def against_ddp(rank, folder):
    """All comparisons of one number of ranks, in one fork."""
    torch.manual_seed(rank)
    ddp, fsdp = trained(rank, "ddp"), trained(rank, "fsdp")
    sgd = [trained(rank, s, target="torch.optim.SGD", clip_norm=None) for s in ("ddp", "fsdp")]
    skip = [trained(rank, s, nonfinite="skip", clip_norm=None) for s in ("ddp", "fsdp")]
    value = [trained(rank, s, clip_value=1e-3, clip_norm=None)[0] for s in ("ddp", "fsdp")]
    legs = {}
    for first, second in (("fsdp", "fsdp"), ("ddp", "fsdp"), ("fsdp", "ddp")):
        place = folder / (first + second)
        trained(rank, first, stop=3, folder=place)
        legs[first, second] = trained(rank, second, folder=place, resume=3)
    sizes = [memory(rank, s) for s in ("ddp", "fsdp")]
    return ddp, fsdp, sgd, skip, value, legs, sizes


def check_against_ddp(results):
    """Compare what `against_ddp` returned on each rank."""
    ddp, fsdp, sgd, skip, value, legs, _ = results[0]
    close = {"rtol": 1e-9, "atol": 1e-11}
    for one, other in ((ddp, fsdp), sgd, skip):
        for part in (0, 1):  # weights, moments
            torch.testing.assert_close(one[part], other[part], **close)
        assert one[2] == pytest.approx(other[2], rel=1e-6)
        assert one[4] == other[4], "the same groups"
    torch.testing.assert_close(value[0], value[1], **close)
    torch.testing.assert_close(ddp[3], fsdp[3], **close)
    assert all(norm > 0.1 for norm in fsdp[3][:3]), "there was something to clip"
    assert len(ddp[4]) == 3
    assert torch.equal(fsdp[0]["inside.weight"], fsdp[0]["outside.weight"]), "still one"
    same, *changed = legs.values()
    for name, weight in fsdp[0].items():
        assert torch.equal(same[0][name], weight), "resumed is straight, bit for bit"
    for number, moments in fsdp[1].items():
        assert all(torch.equal(same[1][number][key], each) for key, each in moments.items())
    assert same[2] == fsdp[2]
    for each in changed:
        torch.testing.assert_close(each[0], fsdp[0], **close)
    whole, *parts = results[0][6][0], *(each[6][1] for each in results)
    assert sum(parts) == whole, "each element lies on one rank"
    assert max(parts) <= 1.1 * whole / len(results)
