"""Training: synthetic stories, reverse-mode autograd for the model's forward pass, the loop."""
