"""Replays in experiment trackers: Weights & Biases, MLflow, TensorBoard."""
