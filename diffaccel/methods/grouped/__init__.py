"""Methods that let a few tokens stand for groups of tokens."""
