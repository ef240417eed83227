"""Stories to learn from, gradients through the forward of inference, and the training loop."""
