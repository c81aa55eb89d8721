"""What the user sees and gives: settings, command line, folders, the inputs of a stage, results, predictions, cards."""
