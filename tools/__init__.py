"""What made the small model in `base/`, the demo and the captions for merging."""
