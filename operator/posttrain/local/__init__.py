"""The same plans executed on one machine without a cluster."""
