"""`python -m distrain`."""

from distrain.cli.command import main

if __name__ == "__main__":
    main()
