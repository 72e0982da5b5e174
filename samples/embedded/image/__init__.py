"""The embedded image model: a FLUX transformer of 256 x 256 pixels."""
