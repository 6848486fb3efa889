"""Tests of the repository itself: its rules, its documents, its requirements."""
