"""`python -m polymerge` is `polymerge`."""

from polymerge.cli import main

if __name__ == "__main__":
    main()
