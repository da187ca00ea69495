"""The model runs again, with policies inside its attention."""
