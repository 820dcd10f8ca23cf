"""Shipped recipes: one TOML file each, read by `mifo.config.load`."""
