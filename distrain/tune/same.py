"""`python -m distrain.tune.same`: refuse runs that exist with another configuration.

Each line of the standard input has the arguments of `python -m distrain` for one run, as JSON.
Nothing is started or written. The exit code is 2 if a run is refused, and 0 otherwise.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from distrain.cli.command import Command
from distrain.config.import_path import import_from_here
from distrain.errors import ExitCode
from distrain.run_layout import CONFIG_FILE
from distrain.runfolder.allowed_changes import changed_keys, check_changes
from distrain.runfolder.files import read_frozen


class _Check(Command):
    """Composes the runs, and compares them with their folders instead of starting them."""

    def _start_own(self, launcher: Any, job: Any, name: str, **_: Any) -> ExitCode:
        frozen = read_frozen(Path(job.run_dir, CONFIG_FILE))
        if frozen is not None:
            changed, allowed = changed_keys(frozen, job.conf), job.conf["allow_changes"]
            check_changes(job.run_dir, changed, allowed, elsewhere="--folder")
        return ExitCode.FINISHED


if __name__ == "__main__":
    import_from_here()
    sys.exit(_Check(*(json.loads(line) for line in sys.stdin), is_last=True).run())
