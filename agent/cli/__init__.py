"""The commands of `commonweight-agent`. Nothing imports this package."""
