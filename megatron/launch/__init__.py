"""A resolved configuration becomes running processes, and a process becomes its rank."""
