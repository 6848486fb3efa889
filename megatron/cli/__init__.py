"""The commands: parse, assemble, call; one module each."""
