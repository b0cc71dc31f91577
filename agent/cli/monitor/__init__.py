"""`commonweight-agent monitor`: one machine, shown to its owner.

`command` starts it, `readings` collects what there is to show, `panels` turns it into lines (pure),
and `app` draws them.
"""
