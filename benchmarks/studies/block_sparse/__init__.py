"""What selectors, correctors, budgets and orders of block-sparse attention do to real tokens."""
