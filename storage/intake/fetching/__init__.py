"""Asking strangers' servers for images: to which addresses, how often, how much of the answer, and whether they mind."""
