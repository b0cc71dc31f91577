"""The agent's home folder: settings, keys, logs, audit log, state of runs.

Any layer above may import it.
"""

from agent.home import consent_migration as consent_migration
