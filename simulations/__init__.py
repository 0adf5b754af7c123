"""Federations in one process, through the same apps that run in deployment."""
