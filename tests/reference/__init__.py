"""Plain-loop references, written from the definitions, one number at a time."""
