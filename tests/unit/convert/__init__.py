"""Tests of megatron.convert."""
