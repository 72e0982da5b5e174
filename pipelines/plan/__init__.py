"""What a generation will cost, before it runs."""
