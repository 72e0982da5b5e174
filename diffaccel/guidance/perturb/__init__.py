"""What guidance damages: heads, blocks, tokens; and the guide that compares."""
