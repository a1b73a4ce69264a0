"""Settings: what they are, and where each comes from."""
