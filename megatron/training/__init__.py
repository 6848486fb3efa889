"""The run: build its parts, loop over steps, validate, save, stop."""
