"""`python -m nmoe.cli`: the `n` command where it is not on the path."""

from nmoe.cli.app import main

if __name__ == "__main__":
    main()
