"""The sandbox: runs programs that nobody has read, behind walls that need no privileges, and speaks Piston's API."""
