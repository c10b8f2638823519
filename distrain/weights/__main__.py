"""`python -m distrain.weights`."""

from distrain.weights.read import main

if __name__ == "__main__":
    raise SystemExit(main())
