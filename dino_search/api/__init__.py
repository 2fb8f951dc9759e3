"""The service: HTTP API and web page over the collections of a home."""
