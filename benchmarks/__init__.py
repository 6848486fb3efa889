"""Side-by-side speed and memory runs; each is one command and prints a ratio."""
