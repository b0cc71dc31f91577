"""Programs that measure: speed, faults, quality. They are no tests; `make` starts them."""
