"""`python -m distrain.weights`."""

from distrain.cli.weights import main
from distrain.process.garbage import skip_last

if __name__ == "__main__":
    code = main()
    skip_last()
    raise SystemExit(code)
