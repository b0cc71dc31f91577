"""`python -m commonweight`: the same as the `commonweight` command."""

from commonweight.cli import main

if __name__ == "__main__":
    main()
