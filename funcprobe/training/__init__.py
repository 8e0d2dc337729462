"""What trainers leave behind: checkpoints and optimizer states."""
