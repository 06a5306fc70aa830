"""Stands for the real package where a test is about the executor: it counts instead of training."""
