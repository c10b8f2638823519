"""`python -m distrain.evaluate`."""

from distrain.cli.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
