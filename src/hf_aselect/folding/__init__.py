"""Folding: a denoiser at a constant timestep, as the weights of a plain transformer."""
