"""The service about itself: health, metrics, versions, documentation."""
