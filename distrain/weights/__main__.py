"""`python -m distrain.weights`."""

from distrain.cli.weights import main

if __name__ == "__main__":
    raise SystemExit(main())
