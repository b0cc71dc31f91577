"""A Flower app that trains nothing, like the `ping` task of commonweight."""
