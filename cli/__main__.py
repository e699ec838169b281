"""`python -m cli` is `persyn`."""

from cli.main import main

if __name__ == "__main__":
    main()
