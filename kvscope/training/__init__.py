"""Train learned gates."""
