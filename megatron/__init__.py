"""Training framework for large language models, driven by YAML, over DeepSpeed.

The map of the packages, their layers and their contracts is megatron/README.md.
"""
