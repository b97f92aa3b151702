"""Folding: a denoiser at constant timesteps, as the weights of a plain transformer."""
