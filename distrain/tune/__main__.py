"""`python -m distrain.tune`."""

from distrain.tune.halving import main

if __name__ == "__main__":
    raise SystemExit(main())
