"""Statistics of tables that merge, and the preprocessing that follows from them. Pure."""
