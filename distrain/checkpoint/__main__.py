"""`python -m distrain.checkpoint`."""

from distrain.cli.checkpoint import main

if __name__ == "__main__":
    raise SystemExit(main())
