"""Uploads to the Hub, and their cards."""
