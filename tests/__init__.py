"""The tests; every folder is a package, so that ranks of a distributed test can import its functions by name."""
