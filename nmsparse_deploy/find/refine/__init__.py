"""Keep the mask, improve the weights that are left."""
