"""`python -m distrain.tune.array`: submit several runs as one job array.

Each line of the standard input has the arguments of `python -m distrain` for one run, as JSON.
"""

from __future__ import annotations

import json
import sys

from distrain.cli.command import main

if __name__ == "__main__":
    main(*(json.loads(line) for line in sys.stdin))
