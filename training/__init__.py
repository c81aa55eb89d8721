"""What keeps hours of training safe, and what every stage shares: settings, folders, checkpoints, runs, estimates."""
