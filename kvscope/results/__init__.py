"""Results on disk: residency, fidelity, summary, and their comparison."""
