"""What several tests share: small fleets, fixtures, tables."""
