"""How arithmetic rounds and whether it repeats: torch's switches of a process, for one training."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"  # read by torch and by cuBLAS when the first product is made


@contextmanager
def numerics(
    *, deterministic: bool, float32_matmul: Literal["highest", "high", "medium"] | None
) -> Iterator[None]:
    """Set torch's switches where asked to, and put them back at the end.

    Args:
        deterministic: only kernels that give the same bits each time, as resuming bit for bit on a
            GPU needs. torch raises RuntimeError where an operation has none.
        float32_matmul: "highest" multiplies matrices of float32 as they are; "high" and "medium"
            let GPUs of Ampere and later round the factors to TF32 or less, which is several times
            as fast. See `torch.set_float32_matmul_precision`.
    """
    with contextlib.ExitStack() as stack:
        if float32_matmul is not None:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision(float32_matmul)
        if deterministic:
            stack.enter_context(_deterministic())
        yield


def autocast(
    device: torch.device, precision: Precision
) -> contextlib.AbstractContextManager[object]:
    """Return the context in which a model is called for a precision."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


@contextmanager
def _deterministic() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    was, benchmark = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(_CUBLAS)
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark = False
    os.environ.setdefault(_CUBLAS, ":4096:8")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warn_only)
        cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop(_CUBLAS, None)
