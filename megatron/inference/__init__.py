"""Text from a trained model: static key-value cache, sampling, stopping, and the command's records."""
