"""What a plug-in looks like whose dependency is missing."""

raise ImportError("no module that it needs")
