"""Care of a coordinator's folder: backup, doctor, audit. Only `cli` imports it."""
