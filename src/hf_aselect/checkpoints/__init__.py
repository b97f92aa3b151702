"""Checkpoints in diffusers' layout: found, fetched, read and converted."""
