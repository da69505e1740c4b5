"""What came out: answers, measures and comparisons on held-out rows."""
