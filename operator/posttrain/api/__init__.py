"""The custom resources: the only schema there is. Pure."""
