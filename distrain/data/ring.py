"""Shared memory that loader processes collate batches into, reused from batch to batch."""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import weakref
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import collate, collate_tensor_fn, default_collate_fn_map
from typing_extensions import override

# of a process: two are loaded ahead, one is in use, and one is spare for work that lags behind
SLOTS = 4
_LEAST_SLOT_BYTES = 1 << 18  # ragged small batches fit, whatever the size of the first
_HEADER = mmap.PAGESIZE  # its first bytes: which slots are in use
_ALIGNMENT = 64  # bytes, that of torch's own memory


class SlotBatch(NamedTuple):
    """A batch on its way: pickled, but its tensors are in a slot, or go torch's way."""

    worker: int
    slot: int
    slot_bytes: int
    pickled: bytes
    others: list[Tensor]


class _Place(NamedTuple):
    """A tensor in a slot."""

    offset: int  # bytes from the start of the slot
    shape: tuple[int, ...]
    dtype: torch.dtype


class Ring:
    """Slots of one loader process, made before it is forked.

    The memory has no name, so nothing is left in /dev/shm, however the processes end. It is
    allocated by the first batch. A slot is in use from then on until the training process has
    dropped the last tensor in it; while all are in use, batches go torch's way.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("distrain-batches")
        weakref.finalize(self, os.close, self._fd)
        self._memory: mmap.mmap | None = None

    def allocate(self, slot_bytes: int) -> mmap.mmap:
        """Set the size, in the loader process, and map the memory."""
        os.ftruncate(self._fd, _HEADER + SLOTS * slot_bytes)
        return self.memory(slot_bytes)

    def memory(self, slot_bytes: int) -> mmap.mmap:
        """Return the memory, which the loader process has allocated."""
        if self._memory is None:
            self._memory = mmap.mmap(self._fd, _HEADER + SLOTS * slot_bytes)
        return self._memory

    def receive(self, sent: SlotBatch) -> Any:
        """Return the batch, in the training process; the slot is in use as long as its tensors."""
        memory = self.memory(sent.slot_bytes)
        slot = _slot_bytes(memory, sent.slot, sent.slot_bytes)
        # each tensor's storage refers to a view of `slot`, and so do its views and saved tensors
        weakref.finalize(slot, _release, memory, sent.slot, os.getpid()).atexit = False
        return _Unpickler(sent.pickled, slot, sent.others).load()


class RingWriter:
    """End of a ring in the loader process with the number `worker`."""

    def __init__(self, ring: Ring, worker: int) -> None:
        self._ring, self._worker = ring, worker
        self._memory: mmap.mmap | None = None
        self._is_off = False
        self._slot_bytes = 0
        ForkingPickler.register(Tensor, _reduced)

    def load(self, reader: Any, item: Any) -> Any:
        """Return `reader[item]`, as a `SlotBatch` if it has large tensors and a slot is free."""
        if self._is_off:
            return reader[item]
        if self._memory is None:
            return self._first(reader, item)
        number = self._memory.find(b"\0", 0, SLOTS)
        if number < 0:
            return reader[item]
        slot = SlotWriter(_slot_bytes(self._memory, number, self._slot_bytes))
        return self._send(_load_into(slot, reader, item), number, slot)

    def _first(self, reader: Any, item: Any) -> Any:
        """Size the slots by the first batch: batches of up to twice its bytes fit."""
        measured = SlotWriter(None)
        batch = _load_into(measured, reader, item)
        if measured.pickle(batch) is None or measured.used == 0:
            self._is_off = True
            return batch
        pages = -(-2 * measured.used // mmap.PAGESIZE)
        self._slot_bytes = max(_LEAST_SLOT_BYTES, pages * mmap.PAGESIZE)
        self._memory = self._ring.allocate(self._slot_bytes)
        return self._send(batch, 0, SlotWriter(_slot_bytes(self._memory, 0, self._slot_bytes)))

    def _send(self, batch: Any, number: int, slot: SlotWriter) -> Any:
        assert self._memory is not None
        was_empty = slot.used == 0
        pickled = slot.pickle(batch)
        if pickled is None or slot.used == 0:
            # torch's way; tensors already in the slot are pickled later, so it is not used again
            self._memory[number] = 0 if was_empty else 1
            return batch
        self._memory[number] = 1
        return SlotBatch(self._worker, number, self._slot_bytes, pickled, slot.others)


class SlotWriter:
    """Puts the tensors of one batch into a slot, one after another.

    Attributes:
        used: bytes.
        others: tensors of the batch that are not in the slot.
        only_counts: whether there is no memory to write to.
    """

    def __init__(self, memory: np.ndarray[Any, Any] | None) -> None:
        """Write to `memory`, (bytes,) uint8; None only counts."""
        self._memory, self.only_counts = memory, memory is None
        self.used = 0
        self.others: list[Tensor] = []
        self._places: dict[int, _Place] = {}  # by address of the values
        self._copied: dict[int, Tensor] = {}  # by address of the storage
        self._of_others: set[int] = set()  # addresses of their storages

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Return memory for a tensor; None if it does not fit."""
        if self._memory is None or (place := self._reserve(shape, dtype)) is None:
            return None
        tensor = _tensor_at(self._memory, place)
        self._places[tensor.data_ptr()] = place
        return tensor

    def _reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> _Place | None:
        size = math.prod(shape) * dtype.itemsize
        end = self.used + size
        if size == 0 or (self._memory is not None and end > len(self._memory)):
            return None
        place = _Place(self.used, shape, dtype)
        self.used = -(-end // _ALIGNMENT) * _ALIGNMENT
        return place

    def pickle(self, batch: Any) -> bytes | None:
        """Return the batch without the values of its tensors; None if it has to go torch's way."""
        buffer = io.BytesIO()
        try:
            _Pickler(buffer, self).dump(batch)
        except Exception:  # torch's way reports it
            return None
        return buffer.getvalue()

    def place(self, tensor: Tensor) -> _Place | int:
        """Return where a tensor is in the slot, copying it if need be; or its number in `others`.

        Nothing is pickled torch's way here: that opens files, which only a receiver closes.
        """
        storage = tensor.untyped_storage().data_ptr()
        is_copyable = _is_plain(tensor) and tensor.is_contiguous() and not tensor.is_shared()
        if is_copyable and storage not in self._of_others:
            place = self._places.get(tensor.data_ptr())
            if place is not None and (place.shape, place.dtype) == (tensor.shape, tensor.dtype):
                return place
            if storage not in self._copied and (place := self._copy(tensor)) is not None:
                self._copied[storage] = tensor
                return place
        if storage in self._copied:
            # a change in one of them has to be seen in the other, as after torch's way
            raise ValueError("two tensors of a batch share memory")
        self._of_others.add(storage)
        self.others.append(tensor)
        return len(self.others) - 1

    def _copy(self, tensor: Tensor) -> _Place | None:
        place = self._reserve(tuple(tensor.shape), tensor.dtype)
        if place is not None:
            self._places[tensor.data_ptr()] = place
            if self._memory is not None:
                _tensor_at(self._memory, place).copy_(tensor)
        return place


_current: SlotWriter | None = None  # of the batch that this loader process collates


def collate_samples(samples: list[Any]) -> Any:
    """Return torch's default batch of the samples, in a slot where this process has one."""
    if _current is None:
        return default_collate(samples)
    return collate(samples, collate_fn_map={**default_collate_fn_map, Tensor: _stack})


def _load_into(slot: SlotWriter, reader: Any, item: Any) -> Any:
    global _current
    _current = slot
    try:
        return reader[item]
    finally:
        _current = None


def _stack(tensors: Sequence[Tensor], *, collate_fn_map: Any = None) -> Tensor:
    first = tensors[0]
    if _is_plain(first) and {t.dtype for t in tensors} == {first.dtype}:
        assert _current is not None
        if _current.only_counts:  # not in memory of torch's, which would be shared
            return torch.stack(list(tensors))
        out = _current.take((len(tensors), *first.shape), first.dtype)
        if out is not None:
            return torch.stack(list(tensors), out=out)
    batch: Tensor = collate_tensor_fn(tensors, collate_fn_map=collate_fn_map)
    return batch


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) is Tensor
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not (tensor.requires_grad or tensor.is_nested or tensor.is_quantized)
        and not (tensor.is_conj() or tensor.is_neg())
    )


def _slot_bytes(memory: mmap.mmap, number: int, size: int) -> np.ndarray[Any, Any]:
    return np.frombuffer(memory, np.uint8, size, _HEADER + number * size)


def _tensor_at(slot: np.ndarray[Any, Any], place: _Place) -> Tensor:
    # a storage of its own per tensor: torch.save of one does not write the others
    values = torch.frombuffer(
        slot, dtype=place.dtype, count=math.prod(place.shape), offset=place.offset
    )
    return values.view(place.shape)


def _release(memory: mmap.mmap, number: int, owner: int) -> None:
    # a process forked from the training process has copies of its tensors, too
    if os.getpid() == owner:
        memory[number] = 0


def _reduced(tensor: Tensor) -> Any:
    # torch's way forgets that the values are yet to be conjugated or negated
    return reduce_tensor(tensor.resolve_conj().resolve_neg())


class _Pickler(ForkingPickler):
    def __init__(self, file: io.BytesIO, slot: SlotWriter) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._slot = slot

    @override
    def persistent_id(self, obj: Any) -> Any:
        # a tensor that consists of others has no memory of its own: these are placed
        is_own = isinstance(obj, Tensor) and not is_traceable_wrapper_subclass(obj)
        return self._slot.place(obj) if is_own else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes, slot: np.ndarray[Any, Any], others: list[Tensor]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._slot, self._others = slot, others
        self._tensors: dict[int, Tensor] = {}

    @override
    def persistent_load(self, pid: _Place | int) -> Tensor:
        if isinstance(pid, int):
            return self._others[pid]
        if pid.offset not in self._tensors:
            self._tensors[pid.offset] = _tensor_at(self._slot, pid)
        return self._tensors[pid.offset]
