"""The program that aggregates updates, and the monitor that shows the fleet.

Layers, from the top; each imports only layers below it: `cli`; `monitor`, `admin`; `remote`,
`daemon`; `api`; `jobs`; `runs`; `strategies`; `transport`; `fleet`; `storage`. All may import
`protocols`; none imports `agent`.
"""
