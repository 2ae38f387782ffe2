"""Raw logs: what their columns mean, how they are read, and what is in them."""
