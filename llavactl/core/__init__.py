"""What every room knows: errors, the schema, the protocols, hooks and plugins, the registry, paths."""
