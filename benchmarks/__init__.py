"""Programs that measure speed, fault tolerance and model quality. Not tests; `make` runs them."""
