"""Side by side with peers: the same work, in one run, as ratios."""
