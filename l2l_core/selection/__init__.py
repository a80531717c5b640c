"""Which pixels of which pseudo-labels may teach: features, policy, reward, training, fixed rules."""
