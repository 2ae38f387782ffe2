"""From an accepted log to split episodes, an observation encoder and batches of transitions."""
