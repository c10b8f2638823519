"""Staging memory: a checkpoint is copied to it, and the writer process reads it."""

from __future__ import annotations

import json
import logging
import math
import mmap
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrain.checkpoint.encode import NamedTensor, Snapshot
from distrain.checkpoint.format import MODEL_FILE, TRAINING_FILE

ALIGNMENT = 64  # bytes, a cache line; a multiple of the size of any element
GRANULE = 1 << 21  # bytes; histories grow, and must not remap the memory at each save
CUDA_HOST_REGISTER_PORTABLE = 1

_log = logging.getLogger("distrain")


class Staging:
    """An anonymous file in memory, shared with another process and reused by all saves."""

    def __init__(self) -> None:
        # not in /dev/shm, whose size containers limit to 64 MB by default
        self.fd = os.memfd_create("distrain-staging")
        self._memory: Tensor = torch.empty(0, dtype=torch.uint8)  # (bytes,) once it is mapped
        self._places: list[tuple[str, tuple[int, ...], int]] = []
        self._views: list[Tensor] = []
        self._pinned: bool | None = None  # None: not tried

    def fill(self, snapshot: Snapshot, job: dict[str, Any]) -> tuple[int, int]:
        """Copy a state and the job that saves it; training may then change the state.

        Args:
            snapshot: the state.
            job: fields for `writer_process`; files and tree are added.

        Returns:
            Offset and length of the job's JSON text in the memory.

        Raises:
            OSError: there is not enough memory.
        """
        tensors = snapshot.tensors
        offsets, end = place(tensors)
        files: dict[str, list[list[Any]]] = {MODEL_FILE: [], TRAINING_FILE: []}
        # safetensors has no padding: wide elements first, so that each is aligned to its size
        for row in sorted(range(len(tensors)), key=lambda row: -_element_bytes(tensors[row])):
            file, name, dtype, shape, nbytes, _ = tensors[row]
            files[file].append([name, dtype, shape, offsets[row], nbytes])
        text = json.dumps({**job, "files": files, "tree": snapshot.tree}).encode()
        self._map(end + len(text))
        self._copy(tensors, offsets)
        self._memory.numpy()[end : end + len(text)] = np.frombuffer(text, np.uint8)
        return end, len(text)

    def _map(self, size: int) -> None:
        if size <= self._memory.numel():
            return
        self._unpin()
        self._places, self._views = [], []
        if os.fstat(self.fd).st_size < size:
            os.posix_fallocate(self.fd, 0, size_with_headroom(size))
        size = os.fstat(self.fd).st_size
        shared = mmap.mmap(self.fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._memory = torch.frombuffer(shared, dtype=torch.uint8)

    def _copy(self, tensors: Sequence[NamedTensor], offsets: Sequence[int]) -> None:
        places = [
            (str(t.source.dtype), tuple(t.source.shape), offset)
            for t, offset in zip(tensors, offsets, strict=True)
        ]
        num_same = min(len(places), len(self._places))
        num_same = next((n for n in range(num_same) if places[n] != self._places[n]), num_same)
        # histories grow, but come after the model and the optimizer, whose views are reused
        rest = zip(tensors[num_same:], offsets[num_same:], strict=True)
        self._views[num_same:] = [_view(self._memory, t, offset) for t, offset in rest]
        self._places = places
        devices = {t.source.device for t in tensors if isinstance(t.source, Tensor)}
        cuda = [device for device in devices if device.type == "cuda"]
        if cuda and self._pinned is None:
            self._pin()
        for view, (*_, source) in zip(self._views, tensors, strict=True):
            if isinstance(source, Tensor):
                view.copy_(source, non_blocking=source.is_cuda)
            else:
                view.numpy()[:] = source
        for device in cuda:
            torch.cuda.current_stream(device).synchronize()

    def _pin(self) -> None:
        """Pin the pages: devices copy to them directly and in parallel."""
        code = _cudart().cudaHostRegister(
            self._memory.data_ptr(), self._memory.numel(), CUDA_HOST_REGISTER_PORTABLE
        )
        self._pinned = int(code) == 0
        if not self._pinned:
            _log.warning("the checkpoint memory could not be pinned (CUDA error %d)", int(code))

    def _unpin(self) -> None:
        if self._pinned:
            _cudart().cudaHostUnregister(self._memory.data_ptr())
        self._pinned = None

    def close(self) -> None:
        """Free the memory; a writer process that has mapped it keeps it until it ends."""
        self._unpin()
        self._places, self._views = [], []
        self._memory = torch.empty(0, dtype=torch.uint8)
        os.close(self.fd)


def _cudart() -> Any:
    return torch.cuda.cudart()


def place(tensors: Sequence[NamedTensor]) -> tuple[list[int], int]:
    """Return the offset of each tensor in the memory, and the end of the last."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, end


def size_with_headroom(size: int) -> int:
    """Return the size to allocate for `size` bytes: a sixteenth more."""
    return -(-(size + size // 16) // GRANULE) * GRANULE


def _element_bytes(tensor: NamedTensor) -> int:
    return tensor.nbytes // (math.prod(tensor.shape) or 1)


def _view(memory: Tensor, tensor: NamedTensor, offset: int) -> Tensor:
    """Return a view of the memory with the dtype and shape of a tensor's source."""
    place = memory[offset : offset + tensor.nbytes]
    if isinstance(tensor.source, Tensor):
        return place.view(tensor.source.dtype).view(tensor.source.shape)
    return place
