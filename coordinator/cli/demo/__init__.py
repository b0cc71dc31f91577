"""`commonweight demo`: a whole fleet on this machine, with data that packages ship."""
