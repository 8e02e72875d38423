"""What front end and workers share: the broker, the artifacts, the model registry, the settings."""
