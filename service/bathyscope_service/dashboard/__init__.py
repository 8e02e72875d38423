"""The dashboard: pages for people, made by the browser from the public routes."""
