"""What goes wrong with a test cluster; it must not know who is told."""

from __future__ import annotations


class ClusterError(Exception):
    """The cluster, or a command against it, did not do what was asked; the message has what it wrote."""
