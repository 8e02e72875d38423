"""What is asked of Tinker's service directly."""
