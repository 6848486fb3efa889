"""Command-line scripts at the paths that users of GPT-NeoX know."""
