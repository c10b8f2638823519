"""`python -m distrain.tune`."""

from distrain.cli.tune import main

if __name__ == "__main__":
    raise SystemExit(main())
