"""Speed beside the peers; nothing here is a test."""
