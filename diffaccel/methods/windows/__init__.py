"""Methods of windows around each query."""
