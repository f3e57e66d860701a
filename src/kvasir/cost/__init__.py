"""What computing takes: seconds of a step, memory of a model, shapes of known models."""
