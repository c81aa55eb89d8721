"""Beyond the paper: negatives by one edit (hallucinations), and reward functions in place of the reward model."""
