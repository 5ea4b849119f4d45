"""What pruning cost, measured on the same held-out samples for the dense and the pruned model."""
