"""dino_index: image collections to embeddings to vector indexes.

Reads images, embeds them with a backbone, keeps them in a catalog and finds the nearest ones. Import what you
need from its modules; `dino_index` itself imports nothing, so that light commands stay light.
"""

__all__: list[str] = []
