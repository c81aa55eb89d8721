"""Beyond the paper: other negatives (edits, samples), reward functions, --tune full, words of other languages."""
