"""Offline RL algorithms: one file each, pure functions over explicit state."""
