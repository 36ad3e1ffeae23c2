"""A learned concept: its files, how it goes into a pipeline, and what it can be made into."""
