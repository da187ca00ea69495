"""Search of policy parameters."""
