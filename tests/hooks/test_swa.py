"""The average of the tail: torch's AveragedModel, with its own BatchNorm, resumed, exported."""

import torch
from ranks import run_ranks
from resume_cases import conf_of, differing, interrupted_and_straight, state_of, train
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn, update_bn

from distrain import Trainer
from distrain.data.loader import TrainLoader
from distrain.hooks import SWA, EvalHook, PreciseBN
from distrain.weights.read import read_weights

STEPS = 9


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def forward(self, x):
        return super().forward(x).square().mean()


class Rows(torch.utils.data.Dataset):
    rows = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return self.rows[index]


def parts():
    torch.manual_seed(0)
    model = Net()
    loader = TrainLoader(Rows(), batch_size=8, rank=0, world_size=1, accumulation=1, seed=0)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), loader


def test_it_is_torchs_average_and_its_statistics():
    model, optimizer, loader = parts()
    averaged = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())
    batches = loader.batches(0)
    data = [next(batches) for _ in range(STEPS + 2)]
    for step, batch in enumerate(data[:STEPS], start=1):
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 3 and (step - 3) % 2 == 0:
            averaged.update_parameters(model)
    update_bn(data[STEPS:], averaged)

    ours, optimizer, loader = parts()
    swa = SWA(3, period=2)
    seen = {}
    evaluation = EvalHook(function=lambda: {"x": seen.setdefault(len(seen), state(ours))["w"]})
    trainer = Trainer(ours, optimizer, loader, hooks=[swa, PreciseBN(2), evaluation])
    trainer.train(0, STEPS)
    for a, b in zip(ours.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), "training is the same"
    average = swa.state_dict()["average"]
    for name, weight in averaged.module.named_parameters():
        assert torch.equal(average[name], weight), name
    torch.testing.assert_close(average["1.running_mean"], averaged.module[1].running_mean)
    inputs = averaged.module[0](torch.cat(data[STEPS:])).detach()
    torch.testing.assert_close(average["1.running_var"], inputs.var(0))
    assert torch.equal(seen[1]["mean"], average["1.running_mean"]), "it is evaluated with them"
    assert torch.equal(seen[0]["mean"], ours[1].running_mean), "and the weights with theirs"
    assert not torch.equal(seen[0]["mean"], seen[1]["mean"])


def state(model):
    return {"w": model[0].weight.sum().item(), "mean": model[1].running_mean.clone()}


HOOKS = {
    "swa": {"_target_": "distrain.hooks.SWA", "start": 4, "period": 3},
    "precise_bn": {"_target_": "distrain.hooks.PreciseBN", "num_iters": 2, "period": 4},
}


def test_interrupted_is_straight_bit_for_bit(tmp_path):
    broken, whole = run_ranks(interrupted_and_straight, 2, tmp_path, hooks=HOOKS, workers=2)[0]
    assert differing(broken, whole) == []
    assert whole["hooks"]["swa"]["updates"] == 3
    assert "net.1.running_var" in whole["hooks"]["swa"]["average"]


def once(rank, folder):
    train(conf_of(hooks=HOOKS), folder)


def test_the_export_has_the_statistics_of_the_average(tmp_path):
    run_ranks(once, 1, tmp_path)
    average = state_of(tmp_path)["hooks"]["swa"]["average"]
    path = max((tmp_path / "checkpoints").glob("iter_*"))
    weights = read_weights(path, ema="swa")
    own = read_weights(path)
    assert weights.keys() == own.keys()
    for name in ("net.1.running_mean", "net.0.weight"):
        assert torch.equal(weights[name], average[name])
        assert not torch.equal(weights[name], own[name])
