"""From results and traces to answers."""
