"""Scores of a model: lm-eval tasks and perplexity, in a program of their own or in the middle of training."""
