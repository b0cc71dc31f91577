"""`commonweight-agent monitor`: one machine, shown to its owner. Only `agent.cli` imports it.

`readings` collects what there is to show, `panels` turns it into lines (pure), `app` draws them.
"""
