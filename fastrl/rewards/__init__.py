"""Rewards: functions with TRL's signature, built-in or the user's own, checked at every call."""

from fastrl.rewards.load import load_rewards, resolve
from fastrl.rewards.score import RewardError, RewardFunction, Scorer, Scores

__all__ = ["RewardError", "RewardFunction", "Scorer", "Scores", "load_rewards", "resolve"]
