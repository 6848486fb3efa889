"""Tests of megatron.observe."""
