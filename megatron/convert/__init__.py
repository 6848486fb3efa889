"""Hugging Face folders out of and into native checkpoints."""
