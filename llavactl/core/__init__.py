"""Shared by all packages: errors, data classes, Protocols, hooks, plugins, the registry and paths."""
