"""The operations of the HTTP API, a module for each family."""
