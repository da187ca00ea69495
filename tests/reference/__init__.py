"""Plain-loop twins, written from the definitions, one number at a time."""
