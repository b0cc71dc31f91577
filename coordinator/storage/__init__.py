"""Files on disk: the ledger, versions of the weights, settings.

Any layer above may import it; it imports none of them. What of a home another machine would need
to continue it: the ledger (`ledger_place`; it can be in a database), keys and certificates
(`settings.Keys`, `ca_files`), settings, the counter of fleet cards (`fleet_cards`), heads that
agents have signed (`seen_heads`), versions and strategy states (`weight_store`), the accepted
updates of an open round (`spool`), files of jobs (`coordinator.jobs.store`), and Flower apps
(`installed_apps`). Peers, tickets, Flower's nodes and the log of versions follow from the ledger.
"""
