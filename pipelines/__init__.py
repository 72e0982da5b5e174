"""Loading and high-resolution generation around diffusers pipelines."""
