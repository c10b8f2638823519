import pytest
import torch
import torch.distributed._composable.fsdp
import torch.distributed.fsdp
import torch.distributed.tensor
from fsdp_cases import (
    Model,
    against_ddp,
    check_against_ddp,
    make,
)
from ranks import run_ranks
from torch import nn

from distrain import Trainer
from distrain.distributed import FSDP
from distrain.distributed.fsdp_blocks import find_blocks
from distrain.errors import ConfigError


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 4])
def test_sharded_equals_ddp_resumes_and_changes_strategy(tmp_path, world_size):
    check_against_ddp(run_ranks(against_ddp, world_size, tmp_path))


def bad(rank):
    said = []
    batch_norm = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    permuted = nn.Linear(3, 2)
    permuted.weight = nn.Parameter(torch.randn(3, 2).t())
    for model in (batch_norm, permuted):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ConfigError) as error:
            Trainer(model, optimizer, [], strategy="fsdp")
        said.append(str(error.value))
    return said


@pytest.mark.ranks
def test_what_cannot_be_sharded_is_refused_in_one_line():
    for norm, permuted in run_ranks(bad, 2):
        assert norm.startswith("trainer.strategy=fsdp: 1 is a BatchNorm with statistics per rank")
        assert permuted.startswith("trainer.strategy=fsdp: weight has shape [2, 3] and strides")
        assert "\n" not in norm + permuted


def test_one_rank_trains_and_bad_settings_are_one_line():
    trainer = make(0, "fsdp")
    trainer.train(0, 2)
    assert not trainer.is_sharded
    for settings in ({"precision": "fp16"}, {"compile": True}, {"channels_last": True}):
        with pytest.raises(ConfigError, match=r"trainer\.strategy=fsdp does not go with"):
            make(0, "fsdp", **settings)
    with pytest.raises(ConfigError, match="trainer.strategy=zero: expected one of ddp, fsdp"):
        make(0, "zero")
    with pytest.raises(ConfigError, match="blocks=Blok: expected a class or name"):
        make(0, FSDP(blocks=["Blok"]))


def test_blocks_are_what_repeats_and_what_is_shared_stays_together():
    model = Model(depth=3)
    assert [name for name, _ in find_blocks(model, None)] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [name for name, _ in find_blocks(model, ["Block"])] == [f"blocks.{i}" for i in range(3)]
    assert [name for name, _ in find_blocks(model, ["blocks.1"])] == ["blocks.1"]
    assert find_blocks(model, ["inside"]) == [], "its weight is outside's too"
    model.blocks[0].linear.weight = model.blocks[2].linear.weight
    assert [name for name, _ in find_blocks(model, None)] == ["blocks.1"]
