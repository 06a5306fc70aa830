"""What operator and workload say to each other. Pure, and imported with nothing but pydantic installed."""
