"""Stages: where prompts and responses come from, and the objective that gives the coefficient."""
