"""Object storage -> batch."""
