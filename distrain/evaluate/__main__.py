"""`python -m distrain.evaluate`."""

from distrain.cli.evaluate import main
from distrain.process.garbage import skip_last

if __name__ == "__main__":
    code = main()
    skip_last()
    raise SystemExit(code)
