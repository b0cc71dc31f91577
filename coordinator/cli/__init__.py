"""The commands of `commonweight`. Nothing imports this package."""
