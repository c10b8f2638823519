"""Status of a run's mirror: a small record in the run folder, for `distrain.runs show`."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from distrain.files import atomic
from distrain.files.open_regular import read_regular
from distrain.run_layout import MIRROR_FILE

_MAX_BYTES = 1 << 16


@dataclass
class MirrorStatus:
    """State of a mirror.

    Attributes:
        url: of the mirror.
        newest: iteration of the newest checkpoint that is complete there; -1 without one, None if
            the place was not read in this start.
        pending: iterations that are still to be uploaded, newest first.
        uploaded: number of uploads of this start.
        skipped: number of checkpoints that a newer one overtook, of this start.
        failed: number of failed attempts, of this start.
        why: reason of the last failure, until an upload succeeds.
        time: UNIX time of this record, seconds.
    """

    url: str
    newest: int | None = None
    pending: tuple[int, ...] = ()
    uploaded: int = 0
    skipped: int = 0
    failed: int = 0
    why: str = ""
    time: float = 0.0

    @property
    def is_behind(self) -> bool:
        """Whether something is left to upload."""
        return bool(self.pending or self.why)

    def line(self) -> str:
        """Return the state as a line of text."""
        there = "not read since the last start"
        if self.newest is not None:
            newest = f"iteration {self.newest}" if self.newest >= 0 else "nothing"
            there = f"{newest} is there"
        parts = [f"{self.url}: {there}"]
        if self.pending:
            parts.append(f"to be uploaded: {', '.join(map(str, self.pending))}")
        counts = [("uploads", self.uploaded), ("skipped", self.skipped), ("failures", self.failed)]
        parts.append(", ".join(f"{number} {name}" for name, number in counts))
        if self.why:
            parts.append(f"last failure: {self.why}")
        return "; ".join(parts)


def write_status(run_dir: str | os.PathLike[str], status: MirrorStatus) -> None:
    """Write the record; errors are ignored, and a removed folder stays removed."""
    status.time = time.time()
    with contextlib.suppress(OSError):
        data = json.dumps(asdict(status)).encode() + b"\n"
        atomic.write(Path(run_dir, MIRROR_FILE), data, sync=False)


def read_status(run_dir: str | os.PathLike[str]) -> MirrorStatus | None:
    """Return the record of a run; None without one, or if it cannot be read."""
    try:
        data: Any = json.loads(read_regular(Path(run_dir, MIRROR_FILE), max_bytes=_MAX_BYTES))
        known = {field.name: data[field.name] for field in fields(MirrorStatus)}
        known["pending"] = tuple(int(each) for each in known["pending"])
        return MirrorStatus(**known)
    except (OSError, ValueError, KeyError, TypeError):
        return None
