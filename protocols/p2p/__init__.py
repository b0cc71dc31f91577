"""What agents tell each other about versions, signed. Pure."""
