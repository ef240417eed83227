"""Techniques that skip work while the model runs, one file each."""
