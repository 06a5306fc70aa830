"""Decisions: from a run and the observed facts to what ought to be. Pure."""
