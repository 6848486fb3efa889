"""Tests of megatron.inference."""
