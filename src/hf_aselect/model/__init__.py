"""What travels with a checkpoint: configuration, models, image processor and all that they are built of."""
