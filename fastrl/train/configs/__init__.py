"""What each command is told: one file a stage."""
