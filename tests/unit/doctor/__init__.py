"""Tests of megatron.doctor."""
