"""The long-running program on a machine that holds private data.

Layers, from the top; each imports only layers below it: `cli`; `daemon`; `analytics`; `trainer`,
`clientapp`, `setup`; `inference`, `transport`; `tasks`, `home`; `data`, `policy`. All may import
`protocols`; none imports `coordinator`.
"""
