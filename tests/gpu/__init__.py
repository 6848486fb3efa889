"""What only a GPU can show; every test is skipped with that reason elsewhere."""
