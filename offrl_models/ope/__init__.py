"""Off-policy evaluation: ratios in, numbers with intervals out. Estimators are pure functions that never see a network."""
