"""Everything around the model: configuration, processes, data, checkpoints, the training loop."""
