"""Commands that make and inspect token files."""
