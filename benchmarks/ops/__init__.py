"""Speed and accuracy of attention ops against their competitors."""
