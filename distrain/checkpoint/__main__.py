"""`python -m distrain.checkpoint`."""

from distrain.checkpoint_table import main

if __name__ == "__main__":
    raise SystemExit(main())
