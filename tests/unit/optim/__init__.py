"""Schedules, parameter groups and optimizers."""
