"""`python -m teachercache`."""

from teachercache.cli import main

if __name__ == "__main__":
    main()
