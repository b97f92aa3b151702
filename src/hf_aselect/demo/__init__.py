"""The demo: the whole of the package on the embedded DiT."""
