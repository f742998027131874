"""A search's outcome on disk: schema, store, replay, plain source. Import the modules, not this package."""
