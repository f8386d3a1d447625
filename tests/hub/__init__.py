"""Repo ids and paths become local files, and folders commits."""
