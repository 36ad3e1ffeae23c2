"""Programs that produce the figures in README.md."""
