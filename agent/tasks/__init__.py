"""Tasks that ship with the agent: one file a task."""
