"""Experiments: models, tasks, policies and budgets from one file, run as cells that are never done twice."""
