"""Training: tokens, attention, objective, and what keeps a run safe."""
