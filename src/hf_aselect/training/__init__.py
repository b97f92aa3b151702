"""What Trainer is given: callback, cached features and metrics."""
