"""Record format of TensorBoard's event files: https://www.tensorflow.org/tutorials/load_data/tfrecord."""

from __future__ import annotations

import struct

# tensorboard's own checksum is a Python loop: 41 ms for an image of 200 kB, during which training
# waits for the interpreter; this one takes 6 us
from google_crc32c import value as crc32c


def record(data: bytes) -> bytes:
    """Return one record: length (8 bytes), its checksum (4), data, their checksum (4)."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, _masked(length), data, _masked(data)))


def _masked(data: bytes) -> bytes:
    # rotated and shifted, as a checksum of data that holds checksums would be weak
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
