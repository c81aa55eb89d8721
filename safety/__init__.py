"""What keeps hours of training safe: checkpoints and resume, signals, logs, ranks, validation, files, the terminal."""
