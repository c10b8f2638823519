"""Client of the mirror process: starts it, and lets it go on."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from distrain.checkpoint.child_process import ChildProcess

_CODE = (
    "import json, sys; "
    "sys.path += [path for path in json.loads(sys.argv[1]) if path not in sys.path]; "
    "from distrain.checkpoint.mirror_process import main; main(sys.argv[2:])"
)


class MirrorProcess(ChildProcess):
    """A process that carries out one task, see `mirror_process.main`; it answers with events."""

    def __init__(self, **task: Any) -> None:
        paths = json.dumps([*sys.path, str(Path(__file__).resolve().parents[2])])
        super().__init__("mirror", _CODE, [paths, json.dumps({**task, "parent": os.getpid()})])

    def go_on(self) -> None:
        """Signal the process to go on, or to finish."""
        # the next event reports its death; closed if another thread starts it again
        with contextlib.suppress(BrokenPipeError, ValueError):
            self.send()
