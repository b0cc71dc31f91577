"""The privacy cost of answers with noise. In `secagg`: sums that show no single update. Pure."""
