"""Transforms of distrain against the plain loop, on ranks, resumed; mistakes in one line."""

import pytest
import torch
from ranks import run_ranks
from resume_cases import Net as Images
from resume_cases import differing, interrupted_and_straight
from torch import nn

import distrain
from distrain import Trainer
from distrain.config.instantiate import build
from distrain.errors import ConfigError
from distrain.transforms import (
    add_lora,
    checkpoint_activations,
    compile_blocks,
    train_in_float8,
)

CALLS = []


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.outside = nn.Linear(16, 32), nn.Linear(32, 16)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x, scale=1.0):
        CALLS.append(torch.is_grad_enabled())
        y = self.outside(self.dropout(self.inside(x).relu()))
        distrain.get_event_storage().put_scalar("size", y.detach().norm(), reduce="sum")
        return x + scale * y


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(x).square().mean()


def trained(transform=None, *, steps=4, **keywords):
    """Return parameters and the histories of a training with a transform."""
    torch.manual_seed(0)
    model = Net()
    if transform is not None:
        model = transform(model, **keywords)
    names = [name for name, _ in model.named_parameters()]
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.05)
    torch.manual_seed(1)
    data = [torch.randn(4, 16) for _ in range(steps)]
    CALLS.clear()
    trainer = Trainer(model, optimizer, data)
    trainer.train(0, steps)
    trainer.reduction.drain(steps)
    return model, names, trainer.storage.history("size").values()


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(norm(nn.Linear(4, 4))) for _ in range(2))

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x).relu()).square().mean()


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_a_checkpointed_block_that_changes_a_buffer_is_refused(norm):
    model = checkpoint_activations(Normed(norm), blocks="Sequential")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, [torch.randn(2, 4)])
    with pytest.raises(ConfigError, match=r"the forward of blocks\.0 changes its buffer 0\."):
        trainer.train(0, 2)


class Cached(nn.Module):
    """Keeps positions for the longest input so far."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.register_buffer("positions", torch.zeros(0))

    def forward(self, x):
        if len(self.positions) < len(x):
            self.positions = torch.arange(float(len(x)))
        return self.net(x + self.positions[: len(x), None])


def test_a_checkpointed_block_may_have_a_cache_that_grows():
    model = nn.Sequential(Cached())
    model = checkpoint_activations(model, blocks="Cached")
    for size in (2, 3):
        model(torch.ones(size, 4)).sum().backward()
    assert len(model[0].positions) == 3


class Masked(nn.Module):
    """Makes a new mask in each forward."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool).tril())

    def forward(self, x):
        self.mask = torch.ones(4, 4, dtype=x.dtype).tril()
        return self.net(x) @ self.mask


def test_a_checkpointed_block_may_replace_a_buffer_by_one_with_the_same_values():
    model = checkpoint_activations(nn.Sequential(Masked()), blocks="Masked")
    for _ in range(2):  # of another dtype at first
        model(torch.ones(2, 4)).sum().backward()


@pytest.mark.parametrize("save", [(), ("aten.mm", "aten.addmm")])
def test_checkpointed_activations_have_the_same_bits_and_scalars(save):
    model, names, sizes = trained()
    assert len(CALLS) == 8
    again, same_names, same_sizes = trained(checkpoint_activations, blocks="Block", save=save)
    assert len(CALLS) == 16, "each block ran again in backward"
    assert same_names == names
    assert same_sizes == sizes
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    with torch.no_grad(), distrain.EventStorage(0):
        again.eval()(torch.ones(2, 16))
    assert len(CALLS) == 18, "nothing runs twice without gradients"


def test_compiled_blocks_are_the_model():
    model, names, _ = trained()
    compiled, same_names, _ = trained(compile_blocks, backend="eager")
    assert same_names == names
    assert compiled._compiled_call_impl is None
    assert all(block._compiled_call_impl is not None for block in compiled.blocks)
    assert all(map(torch.equal, compiled.parameters(), model.parameters()))


def test_lora_is_pefts_in_a_plain_loop():
    from peft import LoraConfig, inject_adapter_in_model

    ours, _, _ = trained(add_lora, match="blocks.*.inside", rank=2, alpha=6, train=["head.*"])
    torch.manual_seed(0)
    model = Net()
    inject_adapter_in_model(LoraConfig(target_modules=["inside"], r=2, lora_alpha=6), model)
    model.head.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    torch.manual_seed(1)
    data = [torch.randn(4, 16) for _ in range(4)]
    for batch in data:
        with distrain.EventStorage(0):
            model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, a), (other, b) in zip(
        ours.named_parameters(), model.named_parameters(), strict=True
    ):
        assert (name, a.requires_grad) == (other, b.requires_grad)
        assert torch.equal(a, b), name
    trained_names = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in trained_names if "lora" in name} == {"lora_A", "lora_B"}
    assert trained_names >= {"head.weight", "head.bias"}


def test_float8_changes_the_chosen_layers_only():
    model, names, sizes = trained()
    near, same_names, near_sizes = trained(train_in_float8, match="blocks.*", emulate=True)
    assert same_names == names
    kinds = {name: type(part).__name__ for name, part in near.named_modules()}
    assert (kinds["blocks.0.inside"], kinds["head"]) == ("Float8Linear", "Linear")
    pairs = [*zip(near.parameters(), model.parameters(), strict=True)]
    assert not all(torch.equal(a, b) for a, b in pairs)
    assert near_sizes[0][0] == pytest.approx(sizes[0][0], rel=0.05)
    assert near_sizes != sizes


def test_interrupted_is_straight_bit_for_bit(tmp_path):
    names = ("add_lora", "checkpoint_activations")
    lora, again = ({"_target_": f"distrain.transforms.{name}"} for name in names)
    transforms = {
        "lora": {**lora, "rank": 2, "dropout": 0.1, "train": ["net.0.*"]},
        "activation_checkpointing": {**again, "blocks": "net.5"},
        "compile_blocks": None,
    }
    settings = {"transforms": transforms, "workers": 2}
    broken, whole = run_ranks(interrupted_and_straight, 2, tmp_path, **settings)[0]
    assert differing(broken, whole) == []
    assert "net.5.lora_A.default.weight" in whole["model"]


@pytest.mark.parametrize(
    ("target", "keywords", "text"),
    [
        ("checkpoint_activations", {"blocks": "Blok"}, "blocks=Blok: expected a class or name"),
        ("checkpoint_activations", {"blocks": ["net"]}, "blocks=.*: expected blocks without Batc"),
        ("checkpoint_activations", {}, "x: blocks=null: expected a model with repeated modules"),
        ("checkpoint_activations", {"blocks": "net.5", "save": ["aten.m"]}, "save=aten.m: expec"),
        ("compile_blocks", {"blocks": "x.*"}, r"blocks=x\.\*: expected a class or name of"),
        ("add_lora", {"match": "net.6"}, "match=net.6: expected a pattern .*did you mean net.5"),
        ("add_lora", {"train": ["nut.0.*"]}, r"train=nut.0.\*: expected a pattern of the names"),
        ("train_in_float8", {"recipe": "x"}, "recipe=x: expected one of tensorwise, rowwise"),
        ("train_in_float8", {}, "this device cannot multiply in float8: .* transforms.float8=null"),
    ],
)
def test_mistakes_are_one_line(target, keywords, text, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    node = {"_target_": f"distrain.transforms.{target}", **keywords}
    with pytest.raises(ConfigError, match=text):
        build(node, "transforms.x", model=Images())
