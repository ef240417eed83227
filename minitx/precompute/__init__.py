"""Techniques that compute something from the weights before the first token, one file each."""
