"""Token files, the order in which samples are seen, and the loader that turns them into batches."""
