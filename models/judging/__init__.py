"""What judges a model: one opened model, its tasks, metrics and fidelity."""
