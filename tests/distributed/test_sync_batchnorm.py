"""SyncBatchNorm held to plain BatchNorm over the whole batch, in ranks that hold parts of it."""

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm

from distrain.distributed import sync_batchnorm as batchnorm
from distrain.distributed.sync_batchnorm import SyncBatchNorm, convert_sync_batchnorm

C = 3
STEPS = 3
SIZES = {"equal": (4, 4), "unequal": (1, 6), "empty": (5, 0), "four": (2, 1, 0, 5)}
SHAPES = {2: (), 3: (5,), 4: (4, 3), 5: (2, 3, 2)}  # what follows (B, C)
PLAIN = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain mean": {"momentum": None},
    "no running statistics": {"track_running_stats": False},
    "no parameters": {"affine": False},
}
if "bias" in inspect.signature(nn.BatchNorm1d).parameters:  # of a later torch than 2.10
    SETTINGS["no bias"] = {"bias": False}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def plain_norm(dims: int, **settings: Any) -> nn.Module:
    """BatchNorm in float64 whose parameters are not just 1 and 0."""
    norm = PLAIN[dims](C, dtype=torch.float64, **settings)
    for index, parameter in enumerate(norm.parameters()):
        parameter.data = randn(C, seed=100 + index)
    return norm


def part_of(whole: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
    return whole.split(sizes)[rank].detach().clone()


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the calls of every collective that torch.distributed has a function for."""
    names = [
        name
        for name in dir(dist)
        if name.startswith(("all_", "reduce", "broadcast", "gather", "scatter", "barrier"))
        and inspect.isfunction(getattr(dist, name))
    ]
    counter: Counter[str] = Counter()
    before = {name: getattr(dist, name) for name in names}

    def wrap(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counter[name] += 1
            return before[name](*args, **kwargs)

        return call

    try:
        for name in names:
            setattr(dist, name, wrap(name))
        yield counter
    finally:
        for name in names:
            setattr(dist, name, before[name])


def train(norm: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
    """Return output and gradients of each step; parameters move by 0.1 times the sum over ranks."""
    steps = []
    for x, dy in batches:
        x.requires_grad_()
        norm.zero_grad()
        y = norm(x)
        y.backward(dy)
        assert x.grad is not None
        step = {"y": y.detach(), "dx": x.grad}
        for name, parameter in norm.named_parameters():
            assert parameter.grad is not None
            step[name] = parameter.grad.clone()
            if dist.is_initialized():
                dist.all_reduce(parameter.grad)
            parameter.data.sub_(parameter.grad, alpha=0.1)
        steps.append(step)
    return steps


def whole_batches(dims: int, size: int) -> list[tuple[Tensor, Tensor]]:
    shape = (size, C, *SHAPES[dims])
    return [(randn(*shape, seed=n) * 3 + 2, randn(*shape, seed=50 + n)) for n in range(STEPS)]


def check_against_plain(dims: int, sizes: tuple[int, ...], settings: dict[str, Any]) -> None:
    plain = plain_norm(dims, **settings)
    batches = whole_batches(dims, sum(sizes))

    def work(rank: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], Tensor]:
        norm = convert_sync_batchnorm(copy.deepcopy(plain))
        parts = [(part_of(x, sizes, rank), part_of(dy, sizes, rank)) for x, dy in batches]
        steps = train(norm, parts)
        return steps, dict(norm.state_dict()), norm.eval()(batches[0][0]).detach()

    results = run_ranks(work, len(sizes))
    wanted = train(plain, [(x.clone(), dy) for x, dy in batches])
    for n, step in enumerate(wanted):
        got = [steps[n] for steps, _, _ in results]
        for name in ("y", "dx"):
            whole = torch.cat([part[name] for part in got])
            torch.testing.assert_close(whole, step[name], **CLOSE)
        for name, _ in plain.named_parameters():  # the ranks' own sums, which add up
            total = torch.stack([part[name] for part in got]).sum(0)
            torch.testing.assert_close(total, step[name], **CLOSE)
    for _, state, in_eval in results:
        torch.testing.assert_close(state, dict(plain.state_dict()), **CLOSE)
        for name, _ in plain.named_buffers():
            assert torch.equal(state[name], results[0][1][name])  # to the bit
        torch.testing.assert_close(in_eval, plain.eval()(batches[0][0]).detach(), **CLOSE)


@pytest.mark.ranks
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dims", SHAPES)
def test_steps_are_those_of_plain_batchnorm_over_the_whole_batch(
    dims: int, sizes: tuple[int, ...]
) -> None:
    check_against_plain(dims, sizes, {})


@pytest.mark.ranks
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_is_that_of_plain_batchnorm(settings: dict[str, Any]) -> None:
    check_against_plain(4, (2, 1, 0, 5), settings)


@pytest.mark.ranks
def test_numbers_by_hand() -> None:
    values = [[1.0, 2.0], [6.0]]  # mean 3, squared deviations 4 + 1 + 9 = 14

    def work(rank: int) -> tuple[Tensor, ...]:
        norm = SyncBatchNorm(1, eps=0.0, momentum=0.5, dtype=torch.float64)
        x = torch.tensor(values[rank], dtype=torch.float64)[:, None].requires_grad_()
        y = norm(x)
        (y * torch.tensor([[float(rank)]])).sum().backward()  # dy is 0, 0 | 1
        found = (y, x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var)
        return tuple(value.detach().flatten() for value in found)

    std = (14 / 3) ** 0.5
    # dx = (dy - 1 / 3 - xhat * (3 / std) / 3) / std, with xhat = -2, -1 | 3, all over std
    dx = [(dy - 1 / 3 - dev / std / std) / std for dy, dev in [(0, -2), (0, -1), (1, 3)]]
    wanted = [
        ([-2 / std, -1 / std], dx[:2], [0.0], [0.0], [1.5], [4.0]),  # 0.5 * 3; 0.5 + 0.5 * 7
        ([3 / std], dx[2:], [3 / std], [1.0], [1.5], [4.0]),
    ]
    for got, want in zip(run_ranks(work, 2), wanted, strict=True):
        for value, numbers in zip(got, want, strict=True):
            torch.testing.assert_close(value, torch.tensor(numbers, dtype=torch.float64))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3),
        nn.BatchNorm2d(3, momentum=None),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.BatchNorm1d(5),
    ).double()


@pytest.mark.ranks
@pytest.mark.parametrize("sizes", [(3, 3), (1, 5), (2, 1, 4, 1)])
def test_a_network_in_ddp_trains_as_one_process_does(sizes: tuple[int, ...]) -> None:
    world_size, total = len(sizes), sum(sizes)
    batches = [(randn(total, 2, 6, 6, seed=n), randn(total, 5, seed=9 + n)) for n in range(4)]

    def work(rank: int) -> dict[str, Tensor]:
        model = DistributedDataParallel(convert_sync_batchnorm(network()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for x, target in batches:
            optimizer.zero_grad()
            error = model(part_of(x, sizes, rank)) - part_of(target, sizes, rank)
            (error.square().sum() * world_size / total).backward()  # DDP averages
            optimizer.step()
        return dict(model.module.state_dict())

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, target in batches:
        optimizer.zero_grad()
        ((model(x) - target).square().sum() / total).backward()
        optimizer.step()
    for state in run_ranks(work, world_size):
        torch.testing.assert_close(state, dict(model.state_dict()), rtol=1e-11, atol=1e-11)


@pytest.mark.ranks
@pytest.mark.parametrize("sizes", [(2, 1), (2, 0, 1, 3)])
def test_gradient_is_that_of_finite_differences(sizes: tuple[int, ...]) -> None:
    x_whole, dy = randn(sum(sizes), C, 2, seed=1), randn(sum(sizes), C, 2, seed=2)
    step = 1e-6

    def work(rank: int) -> Tensor:
        norm = convert_sync_batchnorm(plain_norm(3))

        def loss(whole: Tensor) -> Tensor:
            part = whole.split(sizes)[rank]
            return (norm(part) * part_of(dy, sizes, rank)).sum()

        def loss_over_ranks(whole: Tensor) -> Tensor:
            value = loss(whole).detach()
            dist.all_reduce(value)
            return value

        moved = x_whole.clone()
        numeric = torch.zeros(moved.numel(), dtype=torch.float64)
        for index in range(moved.numel()):
            value = moved.view(-1)[index].item()
            for sign in (1, -1):
                moved.view(-1)[index] = value + sign * step
                numeric[index] += sign * loss_over_ranks(moved) / (2 * step)
            moved.view(-1)[index] = value
        x = x_whole.clone().requires_grad_()
        loss(x).backward()
        assert x.grad is not None
        dist.all_reduce(x.grad)  # zeros but for the rank's own part
        return (x.grad.view(-1) - numeric).abs().max()

    assert max(run_ranks(work, len(sizes))) < 1e-8


@pytest.mark.ranks
def test_one_collective_forward_and_one_backward() -> None:
    def work(rank: int) -> list[dict[str, int]]:
        norm = SyncBatchNorm(C)
        counts = []
        with counted() as counter:
            x = torch.randn(4 * rank, C, 2, requires_grad=True)
            y = norm(x)
            counts.append(dict(counter))
            y.sum().backward()
            counts.append(dict(counter))
            norm(torch.randn(4, C)).sum().backward()  # the input needs no gradient
            counts.append(dict(counter))
            norm.eval()(torch.randn(4, C, requires_grad=True)).sum().backward()
            counts.append(dict(counter))
        return counts

    forward, both = {"all_gather": 1}, {"all_gather": 1, "all_reduce": 1}
    again = {"all_gather": 2, "all_reduce": 1}
    assert run_ranks(work, 2) == [[forward, both, again, again]] * 2


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_norm", ["float32", "same"])
def test_sixteen_bits_are_rounded_only_at_the_ends(dtype: torch.dtype, of_norm: str) -> None:
    sizes = (300, 211)
    whole = randn(sum(sizes), C, 4, seed=1, dtype=dtype) + 10
    dy = randn(sum(sizes), C, 4, seed=2, dtype=dtype)
    norm_dtype = dtype if of_norm == "same" else torch.float32

    def work(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        norm = SyncBatchNorm(C, momentum=1.0, dtype=norm_dtype)
        x = part_of(whole, sizes, rank).requires_grad_()
        y = norm(x)
        y.backward(part_of(dy, sizes, rank))
        assert x.grad is not None
        assert norm.weight.grad.dtype == norm_dtype
        return y.detach(), x.grad, norm.running_var

    plain = nn.BatchNorm1d(C, momentum=1.0, dtype=torch.float64)
    x = whole.double().requires_grad_()
    y = plain(x)
    y.backward(dy.double())
    results = run_ranks(work, 2)
    half_step = torch.finfo(dtype).eps * 0.51
    for got, want in zip(zip(*results, strict=True), (y.detach(), x.grad), strict=False):
        torch.testing.assert_close(
            torch.cat(got).double(), want, rtol=half_step, atol=1e-5, check_dtype=False
        )
        assert got[0].dtype == dtype
    rtol = 1e-6 if norm_dtype == torch.float32 else half_step
    torch.testing.assert_close(results[0][2].double(), plain.running_var, rtol=rtol, atol=0)


@pytest.mark.ranks
def test_a_large_mean_does_not_cancel_the_variance() -> None:
    whole = randn(64, C, seed=1) + 1e6  # float32 rounds the mean itself by 1 / 32
    exact = whole.float().double().var(0)

    def work(rank: int) -> Tensor:
        norm = SyncBatchNorm(C, momentum=1.0)
        norm(part_of(whole.float(), (40, 24), rank))
        assert norm.running_var is not None
        return norm.running_var.double()

    for variance in run_ranks(work, 2):
        torch.testing.assert_close(variance, exact, rtol=1e-6, atol=0)


@pytest.mark.ranks
def test_all_ranks_raise_when_there_is_no_variance() -> None:
    def work(rank: int) -> list[str]:
        messages = []
        norm = SyncBatchNorm(C)
        for shape in [(rank, C), (0, C), (rank,)]:
            with pytest.raises(ValueError) as caught:
                norm(torch.zeros(shape))
            messages.append(str(caught.value))
        assert torch.equal(norm.running_var, torch.ones(C))
        assert torch.equal(norm.running_mean, torch.zeros(C))
        return messages

    for rank, (one, none, no_channels) in enumerate(run_ranks(work, 2)):
        assert one == "1 value(s) per channel over all ranks: expected at least 2 in training"
        assert none == "0 value(s) per channel over all ranks: expected at least 2 in training"
        assert no_channels == f"input is [{rank}]: expected (B, C, ...)"


@pytest.mark.ranks
def test_memory_formats_and_views_give_the_same() -> None:
    def work(rank: int) -> None:
        x = randn(3, 4, 5, C, seed=rank).permute(0, 3, 1, 2)  # channels last
        dy = randn(3, C, 4, 1, seed=rank + 5).expand(-1, -1, -1, 5)
        results = []
        for layout in (x, x.contiguous(), x.transpose(2, 3).contiguous().transpose(2, 3)):
            part = layout.detach().requires_grad_()
            y = SyncBatchNorm(C, dtype=torch.float64)(part)
            y.backward(dy)
            assert part.grad is not None
            results.append((y.detach(), part.grad))
        assert results[0][0].is_contiguous(memory_format=torch.channels_last)
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], **CLOSE)

    run_ranks(work, 2)


@pytest.mark.ranks
def test_frozen_parameters_get_no_gradient_but_the_input_does() -> None:
    def work(rank: int) -> None:
        norm = SyncBatchNorm(C).requires_grad_(False)
        x = torch.randn(4, C, requires_grad=True)
        norm(x).square().sum().backward()
        assert x.grad is not None
        assert norm.weight.grad is None
        assert norm.bias.grad is None

    run_ranks(work, 2)


@pytest.mark.ranks
def test_a_group_of_one_rank_is_plain_batchnorm_without_collectives() -> None:
    def work(rank: int) -> dict[str, int]:
        with counted() as counter:
            check_alone()
        return dict(counter)

    assert run_ranks(work, 1) == [{}]


def check_alone() -> None:
    plain = plain_norm(4)
    norm = convert_sync_batchnorm(copy.deepcopy(plain))
    x = randn(4, C, 2, 2, seed=3)
    assert torch.equal(norm(x), plain(x))
    for got, want in zip(norm.buffers(), plain.buffers(), strict=True):
        assert torch.equal(got, want)


def test_without_a_process_group_it_is_plain_batchnorm() -> None:
    check_alone()


@pytest.mark.ranks
def test_cuda_tensors_go_to_torchs_own_function(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = list(inspect.signature(batchnorm.CudaFunction.forward).parameters)[1:]

    class Recorder:
        @staticmethod
        def apply(*args: Any) -> Any:
            Recorder.seen = dict(zip(parameters, args, strict=True))
            return args[0]

    monkeypatch.setattr(batchnorm, "CudaFunction", Recorder)

    def work(rank: int) -> None:
        norm = SyncBatchNorm(C, momentum=None, eps=0.25)
        with FakeTensorMode(allow_non_fake_inputs=True):
            x = torch.empty(4, C, device="cuda")
        assert norm(x) is x
        names = ("weight", "bias", "running_mean", "running_var")
        own = {name: getattr(norm, name) for name in names}
        rest = {"eps": 0.25, "momentum": 1.0, "process_group": dist.group.WORLD, "world_size": 2}
        for name, value in ({"input": x} | own | rest).items():
            assert Recorder.seen.pop(name) is value or name in ("eps", "momentum", "world_size")
        assert not Recorder.seen

    run_ranks(work, 2)


def test_conversion_keeps_all_but_the_class() -> None:
    model = nn.ModuleDict(
        {
            "one": nn.BatchNorm1d(2, eps=1e-3, momentum=None),
            "two": nn.BatchNorm2d(2, dtype=torch.float64).eval(),
            "three": nn.BatchNorm3d(2, affine=False, track_running_stats=False),
            "nested": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
        }
    )
    model["again"] = model["one"]
    model["one"].weight.requires_grad_(False)
    called = []
    model["one"].register_forward_hook(lambda *_: called.append(1))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    keys, texts = list(model.state_dict()), [part.extra_repr() for part in model.children()]
    modes = [part.training for part in model.modules()]

    assert convert_sync_batchnorm(model) is model
    assert convert_sync_batchnorm(model) is model  # a second time changes nothing
    norms = [model["one"], model["two"], model["three"], model["nested"][1]]
    assert all(type(norm) is SyncBatchNorm for norm in norms)
    assert model["again"] is model["one"]
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(after) == list(tensors)
    assert all(after[name] is tensor for name, tensor in tensors.items())
    assert list(model.state_dict()) == keys
    assert [part.extra_repr() for part in model.children()] == texts
    assert [part.training for part in model.modules()] == modes
    assert not model["one"].weight.requires_grad
    model["one"](torch.randn(4, 2))
    assert called == [1]
    copied = copy.deepcopy(model)
    copied.load_state_dict(model.state_dict())
    assert type(copied["one"]) is SyncBatchNorm


def test_a_module_that_is_a_batchnorm_itself_is_converted() -> None:
    assert type(convert_sync_batchnorm(nn.BatchNorm1d(2))) is SyncBatchNorm


def test_what_computes_something_else_is_left_alone() -> None:
    class Named(nn.BatchNorm2d):
        """A name of the user's own for the same thing."""

    class Doubled(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    of_torch, doubled = nn.SyncBatchNorm(2), Doubled(2)
    parametrized = weight_norm(nn.BatchNorm2d(2), dim=None)
    others = [of_torch, doubled, parametrized, nn.InstanceNorm2d(2), nn.LayerNorm(2)]
    types = [type(part) for part in others]
    model = convert_sync_batchnorm(nn.Sequential(*others, Named(2)))
    assert [type(part) for part in model] == [*types, SyncBatchNorm]


def test_a_lazy_one_is_converted_with_its_first_batch() -> None:
    norm = convert_sync_batchnorm(nn.LazyBatchNorm2d())
    norm(torch.randn(2, 4, 3, 3))
    assert type(norm) is SyncBatchNorm
    assert norm.num_features == 4
