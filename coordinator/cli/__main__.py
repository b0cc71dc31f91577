"""`python -m coordinator.cli`, as the commands start a coordinator of their own."""

from coordinator.cli.main import main

main()
