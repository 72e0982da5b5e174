"""The embedded scorer: a CLIP model that says how well a picture fits a prompt."""
