"""HOW it is run: packing, perturbing, running, scoring, combining."""
