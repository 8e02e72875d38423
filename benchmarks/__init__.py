"""How fast Bathyscope is, as ratios of two things measured alternately in one run; see README.md."""
