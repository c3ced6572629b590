"""Rewards: entry points, built-in verifiers, and the killable workers that run them."""
