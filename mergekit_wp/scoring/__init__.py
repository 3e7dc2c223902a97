"""From two checkpoints and a prompt file to a score file."""
