"""The embedded video model: a Wan pipeline of 128 x 128 pixels and 17 frames."""
