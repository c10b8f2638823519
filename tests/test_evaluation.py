import pytest
import torch
from ranks import run_ranks
from torch import nn

from distrain.data import EvalLoader
from distrain.evaluation import evaluate


class Samples(torch.utils.data.Dataset):
    def __init__(self, num):
        self.num = num

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        return torch.tensor(float(index))


class Model(nn.Module):
    def forward(self, batch):
        assert not self.training
        return batch.mean()

    def metrics(self, batch):
        return {"value": batch, "is_even": (batch % 2 == 0).float()}


def evaluate_on(rank, num, batch_size, model):
    world_size = torch.distributed.get_world_size()
    loader = EvalLoader(Samples(num), batch_size=batch_size, rank=rank, world_size=world_size)
    return evaluate(model.train(), loader, device=torch.device("cpu")), model.training


@pytest.mark.ranks
@pytest.mark.parametrize(("num", "batch_size"), [(10, 2), (7, 3), (1, 4), (2, 1)])
def test_every_sample_counts_once_on_any_number_of_ranks(num, batch_size):
    expected = {"value": (num - 1) / 2, "is_even": ((num + 1) // 2) / num}
    for result, is_training in run_ranks(evaluate_on, 3, num, batch_size, Model()):
        assert result == pytest.approx(expected)
        assert is_training


def test_without_metrics_losses_are_weighted_by_the_batch():
    class Plain(nn.Module):
        def forward(self, batch):
            return batch.mean()

    loader = EvalLoader(Samples(7), batch_size=3)
    assert evaluate(Plain(), loader, device=torch.device("cpu")) == {"loss": 3.0}


def test_a_metric_is_one_value_a_sample():
    class Wrong(Model):
        def metrics(self, batch):
            return {"accuracy": batch.mean()}

    with pytest.raises(ValueError, match=r"'accuracy' is \[\].*\[3\]"):
        evaluate(Wrong(), EvalLoader(Samples(7), batch_size=3), device=torch.device("cpu"))
