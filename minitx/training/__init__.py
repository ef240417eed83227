"""Stories to learn from, gradients through the same forward that inference runs, and the training loop."""
