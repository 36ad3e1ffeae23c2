"""Base models: where they are, what families there are, and how new words get into them."""
