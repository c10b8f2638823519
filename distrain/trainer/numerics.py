"""Determinism, float32 matmul precision and autocast of one training."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"  # read by torch and by cuBLAS at the first matrix product


@contextmanager
def numerics(
    *, deterministic: bool, float32_matmul: Literal["highest", "high", "medium"] | None
) -> Iterator[None]:
    """Set torch's process-wide switches, and restore them at the end.

    Args:
        deterministic: use kernels that give the same bits each time, as resuming bit for bit on a
            GPU needs. torch raises RuntimeError where an operation has none.
        float32_matmul: "highest" multiplies float32 matrices as they are; "high" and "medium" let
            GPUs of Ampere and later round the factors to TF32 or less, which is several times as
            fast. See `torch.set_float32_matmul_precision`. None leaves torch's setting.
    """
    with contextlib.ExitStack() as stack:
        if float32_matmul is not None:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision(float32_matmul)
        if deterministic:
            stack.enter_context(_deterministic())
        yield


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """Return the dtype of autocast, None for "fp32"."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


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
