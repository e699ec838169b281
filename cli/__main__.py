"""Run the command line with `python -m persyn.cli`."""

from persyn.cli.main import main

if __name__ == "__main__":
    main()
