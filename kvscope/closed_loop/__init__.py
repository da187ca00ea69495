"""The closed loop: the model runs again, with policies evicting keys inside its attention."""
