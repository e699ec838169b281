"""`python -m persyn.cli` is `persyn`."""

from persyn.cli.main import main

if __name__ == "__main__":
    main()
