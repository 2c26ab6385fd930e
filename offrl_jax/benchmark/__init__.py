"""Suites, plan, run loop, checkpoints: everything between a request and its rows."""
