"""Tests of megatron.checkpoint."""
