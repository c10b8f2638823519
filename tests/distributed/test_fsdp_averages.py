"""Evaluation and averaged weights of a sharded model are those of DDP, resumed, too."""

import pytest
import torch
import torch.distributed._composable.fsdp
import torch.distributed.fsdp
import torch.distributed.tensor
from checkpoint_cases import InlineStore
from ranks import run_ranks
from torch import nn

from distrain import HookBase, Trainer
from distrain.data.loader import EvalLoader, TrainLoader
from distrain.distributed.sync_batchnorm import convert_sync_batchnorm
from distrain.hooks import EMA, SWA, EvalHook, PeriodicCheckpointer, PreciseBN, ScheduleFree


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6)

    def forward(self, x):
        return x + self.norm(self.linear(x)).relu()


class Net(nn.Module):
    """Its metrics call the blocks, not the model."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 6)  # of the root, outside of the blocks
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, batch):
        return self.metrics(batch)["size"].mean()

    def metrics(self, batch):
        return {"size": self.blocks(self.stem(batch)).square().mean(1)}


def samples():
    return torch.randn(48, 6, generator=torch.Generator().manual_seed(5))


def evaluated(
    rank, world_size, strategy, hooks, *, folder=None, start=0, stop=6, free=False, function=False
):
    """Return the evaluations of a training, by name and iteration."""
    torch.manual_seed(0)
    model = convert_sync_batchnorm(Net())
    if free:
        from schedulefree import AdamWScheduleFree as Optimizer
    else:
        from torch.optim import AdamW as Optimizer
    optimizer = Optimizer(model.parameters(), lr=0.05)
    share = {"rank": rank, "world_size": world_size}
    few = EvalLoader(samples()[:7], batch_size=6, **share)

    @torch.no_grad()
    def size():
        model.eval()
        found = {"size": float(model(samples()[:7]))}
        model.train()
        return found

    of_loader = EvalHook(2, eval_loader=few)
    hooks = {**hooks(), "eval": EvalHook(2, function=size) if function else of_loader}
    if folder is not None:
        store = InlineStore(folder)
        hooks["checkpoint"] = PeriodicCheckpointer(checkpoints=store)
    loader = TrainLoader(samples(), batch_size=12, seed=3, **share)
    trainer = Trainer(model, optimizer, loader, hooks=hooks, strategy=strategy, window=2)
    if start:
        trainer.load_state_dict(store.load(start))
    trainer.train(start, stop)
    trainer.reduction.drain(stop)
    histories = {name: trainer.storage.history(name) for name in trainer.storage.latest()}
    return {
        name: {iteration: value for value, iteration in history.values()}
        for name, history in histories.items()
        if name.startswith("eval")
    }


@pytest.mark.ranks
def test_metrics_may_call_blocks_before_the_first_forward():
    ddp, fsdp = (run_ranks(evaluated, 2, 2, s, dict)[0] for s in ("ddp", "fsdp"))
    assert ddp["eval/size"].keys() == {1, 3, 5}
    assert fsdp["eval/size"] == pytest.approx(ddp["eval/size"], rel=1e-5)


def averages():
    return {"ema": EMA(0.5), "swa": SWA(2), "precise_bn": PreciseBN(2, period=2)}


def ema_instead():
    return {"ema": EMA(0.5, evaluate="instead"), "precise_bn": PreciseBN(2, period=2)}


def schedule_free():
    return {"free": ScheduleFree(), "precise_bn": PreciseBN(2, period=2)}


@pytest.mark.ranks
@pytest.mark.parametrize("hooks", [averages, ema_instead, schedule_free])
def test_averaged_weights_are_evaluated_saved_and_resumed(tmp_path, hooks):
    free = hooks is schedule_free
    if free:
        pytest.importorskip("schedulefree")
    ddp = run_ranks(evaluated, 2, 2, "ddp", hooks, free=free)[0]
    run_ranks(evaluated, 2, 2, "fsdp", hooks, folder=tmp_path, stop=4, free=free)
    # another number of ranks
    resumed = run_ranks(
        evaluated, 3, 3, "fsdp", hooks, folder=tmp_path, start=4, stop=6, free=free
    )[0]
    assert len(ddp) == (3 if hooks is averages else 1)
    for name, values in ddp.items():
        assert resumed[name] == pytest.approx(values, rel=1e-4), name


@pytest.mark.ranks
@pytest.mark.parametrize("hooks", [averages, ema_instead])
def test_a_function_that_calls_the_sharded_model_evaluates_its_average(hooks):
    ddp, fsdp = (run_ranks(evaluated, 2, 2, s, hooks, function=True)[0] for s in ("ddp", "fsdp"))
    for name, values in ddp.items():
        assert fsdp[name] == pytest.approx(values, rel=1e-4), name


class Probe(HookBase):
    """Calls the model between the backward and the update."""

    @torch.no_grad()
    def after_backward(self):
        model = self.trainer.module
        model.eval()
        model(samples()[:5])
        model.train()


@pytest.mark.ranks
def test_an_update_is_seen_after_a_hook_that_calls_the_sharded_model():
    ddp, fsdp = (
        run_ranks(evaluated, 2, 2, s, lambda: {"probe": Probe()})[0] for s in ("ddp", "fsdp")
    )
    assert fsdp["eval/size"] == pytest.approx(ddp["eval/size"], rel=1e-4)
