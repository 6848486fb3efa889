"""ModelSpec and the flat list of named layers that it describes."""
