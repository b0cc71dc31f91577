"""A Flower app that trains nothing, as the `ping` task of commonweight."""
