"""The simulation that the open and the closed loop share: cache state, scores, eviction, and metrics."""
