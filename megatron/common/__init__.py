"""Errors, logging, files and the rank environment: what every layer may use. Never imports torch."""
