"""`python -m agent.cli`, as services installed by older versions start it."""

from agent.cli.main import main

main()
