"""Block-sparse attention: every query block attends its own list of key blocks."""
