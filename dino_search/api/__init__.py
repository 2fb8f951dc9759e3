"""The HTTP API: what `dino-search serve` runs. `app.create_app` puts it together."""
