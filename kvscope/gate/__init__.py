"""Attention gates: small learned modules that say which keys are worth keeping. Their definition, file and training."""
