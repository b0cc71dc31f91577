"""What answers with noise cost. In `secagg`: sums that show no single update. Pure."""
