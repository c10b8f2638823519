"""SyncBatchNorm: batch normalisation over the batches of all ranks, on CUDA and on the CPU."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules._functions import SyncBatchNorm as CudaFunction
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.utils.parametrize import is_parametrized


class SyncBatchNorm(_BatchNorm):
    """BatchNorm with the statistics of the batches of all ranks in training; takes its arguments.

    Ioffe & Szegedy 2015, "Batch Normalization", section 3, algorithm 1, with every sum over all
    ranks: `y = (x - mean) / sqrt(var + eps) * weight + bias` per channel, `var` with division by
    the number of values; `running_var` divides by that number less one.
    Example: rank 0 holds 1, 2 and rank 1 holds 6: mean 3, var (4 + 1 + 9) / 3, 7 for `running_var`.

    On CUDA this is torch's own function, which does not take CPU tensors; there it is one gather of
    (count, mean, squared deviations) in the forward pass and one sum in the backward pass, over the
    default process group. The batches of the ranks may differ in size; some may be empty. Gradients
    of `weight` and `bias` are those of the rank's own batch, as in torch: DDP averages them. With
    one rank, in eval mode or without a process group it is plain BatchNorm. 16-bit samples are
    normalised in float32.

    Raises:
        ValueError: an input has no channel dimension, or fewer than two values per channel over all
            ranks (not checked on CUDA with several ranks).
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised input; a collective in training.

        Args:
            input: (B, C, ...); B may differ between ranks.
        """
        group = self._group()
        if group is None:
            return super().forward(input)
        self._check_input_dim(input)
        running_mean, running_var = None, None
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.track_running_stats:
            running_mean, running_var = self.running_mean, self.running_var
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                if self.momentum is None:
                    momentum = 1.0 / float(self.num_batches_tracked)
        arguments = (input, self.weight, self.bias, running_mean, running_var, self.eps, momentum)
        function: Any = CudaFunction if input.is_cuda else _CpuFunction
        return cast(Tensor, function.apply(*arguments, group, group.size()))

    def _group(self) -> dist.ProcessGroup | None:
        """Return the ranks that share statistics; None for plain BatchNorm."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD
        return group if group is not None and group.size() > 1 else None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input is {[*input.shape]}: expected (B, C, ...)")


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Convert each BatchNorm1d, 2d and 3d to SyncBatchNorm in place; return the module.

    Each stays the same object with its parameters, buffers, hooks and mode, so that shared modules
    stay shared and names in the state dict do not change. Lazy ones are converted by their first
    batch. Subclasses with a `forward` of their own, such as torch's SyncBatchNorm, and those with
    parametrizations, which live in the class, are left as they are.
    """
    for part in module.modules():
        if not isinstance(part, _BatchNorm) or type(part).forward is not _BatchNorm.forward:
            continue
        if isinstance(part, _LazyNormBase):
            part.cls_to_become = SyncBatchNorm
        elif not is_parametrized(part):
            part.__class__ = SyncBatchNorm
    return module


class _CpuFunction(torch.autograd.Function):
    """Normalisation in training; torch's kernels of eval mode do the passes over the data.

    With `xhat = (x - mean) * invstd` and sums over the N values a channel has on all ranks
    (Ioffe & Szegedy 2015, section 3, put together):
    `dx = weight * invstd * (dy - sum(dy) / N - xhat * sum(dy * xhat) / N)`.
    The first term is the gradient of eval mode, where mean and variance are constants.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (B, C, ...)
        weight: Tensor | None,  # (C,)
        bias: Tensor | None,  # (C,)
        running_mean: Tensor | None,  # (C,)
        running_var: Tensor | None,  # (C,)
        eps: float,
        momentum: float,
        group: dist.ProcessGroup,
        world_size: int,
    ) -> Tensor:
        x_wide = _wide(x)
        count, mean, squares = _over_ranks(x_wide, group, world_size)
        if count < 2:
            raise ValueError(
                f"{count} value(s) per channel over all ranks: expected at least 2 in training"
            )
        if running_mean is not None and running_var is not None:
            running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
            running_var.mul_(1 - momentum).add_(squares / (count - 1), alpha=momentum)
        mean, var = mean.to(x_wide.dtype), (squares / count).to(x_wide.dtype)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.group, ctx.count = eps, group, count
        if not x.numel():  # the kernels would divide by zero
            return torch.empty_like(x)
        y: Tensor = torch.native_batch_norm(
            x_wide, _wide(weight), _wide(bias), mean, var, False, 0.0, eps
        )[0]
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        x_wide, weight_wide = _wide(x), _wide(weight)
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
        if x.numel():
            statistics = (mean, var, mean, var)
            dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
                _wide(dy), x_wide, weight_wide, *statistics, False, ctx.eps, [needs_dx, True, True]
            )
        else:
            dx, dweight, dbias = x_wide.clone(), torch.zeros_like(mean), torch.zeros_like(mean)
        if needs_dx:
            sums = torch.stack([dbias, dweight])  # (2, C): sum of dy, of dy * xhat
            dist.all_reduce(sums, group=ctx.group)
            invstd = torch.rsqrt(var + ctx.eps)
            scale = invstd if weight_wide is None else weight_wide * invstd
            shift, slope = sums * (scale / ctx.count)  # (C,) each
            dx.sub_(_per_channel(shift, x))
            dx.addcmul_(x_wide - _per_channel(mean, x), _per_channel(slope * invstd, x), value=-1)
        return (
            dx.to(x.dtype) if needs_dx else None,
            dweight.to(weight.dtype) if needs_dweight else None,
            dbias.to(weight.dtype) if needs_dbias else None,
            *[None] * 6,
        )


def _over_ranks(x: Tensor, group: dist.ProcessGroup, world_size: int) -> tuple[int, Tensor, Tensor]:
    """Return count, mean (C,), squared deviations (C,) of x (B, C, ...). A collective."""
    own = channel_moments(x)
    rows = own.new_empty(world_size, own.numel())
    dist.all_gather([*rows.unbind()], own, group=group)
    count, mean, squares = merged_moments(rows)
    return int(count), mean, squares


def channel_moments(x: Tensor) -> Tensor:
    """Return (1 + 2C,) in float64: count, means, sums of squared deviations per channel.

    The deviations `d = x - m` are from the rounded mean m, corrected for the rounding (Chan, Golub
    & LeVeque 1983, "Algorithms for Computing the Sample Variance"): `mean = m + sum(d) / count` and
    `squares = sum(d^2) - sum(d)^2 / count`. float64 also counts beyond float32's 2^24. Example:
    values 1, 3 of one channel give 2, 2, 2.

    Args:
        x: (B, C, ...); may be empty.
    """
    channels = x.size(1)
    own = torch.zeros(1 + 2 * channels, dtype=torch.float64, device=x.device)
    if x.numel():
        over = [0, *range(2, x.dim())]
        mean = x.mean(over)
        deviations = x - _per_channel(mean, x)
        drift = deviations.mean(over).double()  # rounding error of the mean
        own[0] = x.numel() // channels
        own[1 : 1 + channels] = mean + drift
        own[1 + channels :] = deviations.square_().sum(over) - own[0] * drift.square()
    return own


def merged_moments(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return count (), mean (C,) and sum of squared deviations (C,) of several sets of values.

    Without sums of squares, whose difference would cancel (Chan, Golub & LeVeque 1979, "Updating
    Formulae and a Pairwise Algorithm for Computing Sample Variances"):
    `squares = sum_r(squares_r + count_r * (mean_r - mean)^2)`. The same rows give the same bits.

    Args:
        rows: (n, 1 + 2C), each as `channel_moments` returns it.
    """
    channels = rows.size(1) // 2
    counts, means, squares = rows.split_with_sizes(
        [1, channels, channels], dim=1
    )  # (n, 1), (n, C), (n, C)
    count = counts.sum()
    mean = (counts * means).sum(0) / count.clamp(min=1)
    return count, mean, (squares + counts * (means - mean).square()).sum(0)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Return (C,) values in the shape (1, C, 1, ...), which broadcasts with x."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def _wide(tensor: Any) -> Any:
    """Return a tensor in float32 at least; None for None."""
    if tensor is None or tensor.dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.float()
