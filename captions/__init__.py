"""Regularisation captions for merging."""
