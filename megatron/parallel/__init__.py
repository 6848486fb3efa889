"""Who holds what: rank arithmetic, process groups, sharded layers, and the collectives between them."""
