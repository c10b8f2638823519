"""Strategy: how a model is spread over the ranks; the base class for one process alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distrain.checks import number
from distrain.distributed.quantized_state import from_plain, to_plain
from distrain.distributed.ranks import Topology
from distrain.errors import ConfigError


class Strategy:
    """Use of the ranks by a trainer. This base class trains the model on this process alone.

    `DDP`, `FSDP` and classes of users override parts of it; `trainer.strategy._target_` chooses.
    The trainer calls, on every rank::

        strategy.check(precision="bf16", accumulation=2, ...)
        model = strategy.wrap(module, optimizer, device)
        strategy.warm_up(model, first_loss)                 # before the first step
        with strategy.no_sync(model):                       # all micro-batches but the last
            ...                                             # forward and backward
        strategy.clip(parameters, norm=1.0)
        strategy.state_dict(module, optimizer)              # at a checkpoint

    Attributes:
        is_sharded: whether ranks hold parts of the parameters: `state_dict` is a collective then.
    """

    is_sharded: bool = False

    def check(self, **settings: Any) -> None:
        """Check the trainer's settings.

        Args:
            settings: accumulation, channels_last, compile, nonfinite and precision.

        Raises:
            ConfigError: one does not go with this strategy.
        """

    def data_ranks(self, ranks: Topology) -> Topology:
        """Return which part of each batch this rank takes, and of how many.

        Ranks that hold parts of one replica of the model return the same part.
        """
        return ranks

    def wrap(self, module: nn.Module, optimizer: Optimizer, device: torch.device) -> nn.Module:
        """Return the model that is called in a step. A collective in most strategies.

        Args:
            module: the model; all ranks must train with rank 0's weights.
            optimizer: over its parameters, without state yet.
            device: of this rank.
        """
        return module.to(device)

    def wrap_parts(
        self, module: nn.Module, optimizers: Sequence[Optimizer], device: torch.device
    ) -> nn.Module:
        """As `wrap`, for a `Step`, which calls any parts of the module in any order.

        Gradients may stay those of this rank until `reduce_gradients`.
        """
        return self.wrap(module, optimizers[0], device)

    def before_parts(self, module: nn.Module) -> None:
        """Prepare for one iteration of a `Step`. May be a collective."""

    def reduce_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace gradients of parts by their mean over ranks, if that is not done yet."""

    def warm_up(self, model: nn.Module, first_loss: Callable[[], Tensor]) -> None:
        """Prepare for the first step, leaving the model, its gradients and the data unchanged.

        Args:
            model: as `wrap` returned it.
            first_loss: calls it with the first batch, which the first step gets again.
        """

    def reduced_parameters(self, model: nn.Module) -> Collection[str] | None:
        """Return the names of the parameters whose gradients are reduced; None for all."""
        return None

    def no_sync(self, model: nn.Module) -> AbstractContextManager[object]:
        """Return a context in which gradients accumulate on each rank without a reduction."""
        return nullcontext()

    def reduced_backward(self, model: nn.Module) -> AbstractContextManager[object]:
        """Return a context for a backward inside `no_sync` after which `grad` must hold the sum.

        Only where gradients are scaled after the last forward, see `WeightedGradients`.
        """
        return nullcontext()

    def local(self, tensor: Tensor) -> Tensor:
        """Return this rank's part of a parameter or gradient, which shares its memory."""
        return tensor

    def gathered(self, state: Any) -> Any:
        """Return a nested state with whole tensors; complete on rank 0.

        A collective if `is_sharded`.
        """
        return state

    def part_of(self, whole: Tensor, like: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor, placed as `like`, a parameter, is."""
        return whole

    def gradient_norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return the () 2-norm of all gradients together, equal on all ranks.

        Raises:
            ConfigError: gradients are sparse.
        """
        with _for_dense("trainer.nonfinite=skip", parameters):
            return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def clip(
        self, parameters: Sequence[Tensor], *, norm: float | None = None, value: float | None = None
    ) -> Tensor | None:
        """Clip the gradients in place; return their () norm before it, None without `norm`.

        Nothing is read back from the device. A norm that is not finite raises nothing, and makes
        all gradients NaN.

        Args:
            parameters: those without a gradient are skipped.
            norm: largest 2-norm of all gradients together; `inf` measures only.
            value: largest absolute value of an element.

        Raises:
            ConfigError: gradients are sparse.
        """
        with _for_dense("trainer.clip_norm" if value is None else "trainer.clip_value", parameters):
            if value is not None:
                nn.utils.clip_grad_value_(parameters, value)
            return None if norm is None else nn.utils.clip_grad_norm_(parameters, norm)

    def whole_parameters(self, module: nn.Module) -> AbstractContextManager[object]:
        """Return a context in which each rank may call the module on its own. A collective."""
        return nullcontext()

    def free_gathered(self, module: nn.Module) -> None:
        """Free whole parameters that a forward without a backward has left: their parts change."""

    def state_dict(self, module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Return "model" and "optimizer"; complete on rank 0. A collective if `is_sharded`."""
        return {"model": module.state_dict(), "optimizer": to_plain(optimizer.state_dict())}

    def load_state_dict(
        self, module: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]
    ) -> None:
        """Load what `state_dict` returned, with any strategy and number of ranks.

        The optimizer's implementation (fused, foreach) stays this run's.

        Args:
            module: the model.
            optimizer: of its parameters.
            state: "model" and "optimizer", with tensors on the CPU.

        Raises:
            RuntimeError: names or shapes of the model's tensors differ; all are listed.
        """
        module.load_state_dict(state["model"])
        kept: list[dict[str, Any]] = [
            {key: group[key] for key in ("fused", "foreach") if key in group}
            for group in optimizer.param_groups
        ]
        optimizer.load_state_dict(from_plain(state["optimizer"]))
        for group, keywords in zip(optimizer.param_groups, kept, strict=True):
            group.update(keywords)


@contextmanager
def _for_dense(key: str, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Raise ConfigError where torch fails, as it has no norm and no limit of sparse gradients."""
    try:
        yield
    except NotImplementedError as error:
        if any(p.grad is not None and p.grad.is_sparse for p in parameters):
            expected = "dense gradients; leave out sparse=True of the embedding, or this setting"
            raise ConfigError(f"{key}: expected {expected}") from error
        raise


def check_clipping(norm: float | None, value: float | None) -> None:
    """Raise ConfigError if both limits of `Strategy.clip` are given, or one is not above 0."""
    if norm is not None and value is not None:
        raise ConfigError(
            f"trainer.clip_norm={norm}, trainer.clip_value={value}: expected one; keep one"
        )
    for key, limit in (("trainer.clip_norm", norm), ("trainer.clip_value", value)):
        if limit is not None and limit != float("inf"):
            number(key, limit, above=0.0)
