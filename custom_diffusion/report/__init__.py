"""The page that a run leaves to be looked at."""
