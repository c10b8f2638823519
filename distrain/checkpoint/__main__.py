"""`python -m distrain.checkpoint`."""

from distrain.cli.checkpoint import main
from distrain.process.garbage import skip_last

if __name__ == "__main__":
    code = main()
    skip_last()
    raise SystemExit(code)
