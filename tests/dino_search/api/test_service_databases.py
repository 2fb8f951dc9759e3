"""What a service does with its catalog, in either database."""

from __future__ import annotations

from pathlib import Path

import pytest

import databases
from running_service import running_service
from sample_collections import index_files, jpeg, write_pictures

pytestmark = pytest.mark.usefixtures("database")


def test_a_service_searches_takes_pictures_and_keeps_verdicts(home: Path, photos: Path, tiny_model: Path) -> None:
    index_files(home, tiny_model, photos, labels="folders")
    with running_service(home, database=databases.url_of(home)) as service:
        sent = service.http.post("/collections/default/images", files={"image": jpeg(500)})
        sent.raise_for_status()
        found = service.http.post("/search", files={"image": jpeg(500)}, data={"k": 2}).json()["results"]
        assert found[0]["score"] == pytest.approx(1, abs=1e-3)
        first, second = found[0]["image_id"], found[1]["image_id"]
        verdict = {"query_id": first, "reference_id": second, "decision": "not_copy"}
        service.http.put("/verdicts", json={"verdicts": [verdict]}).raise_for_status()
        assert service.http.delete(f"/collections/default/images/{first}").status_code == 204
        again = service.http.post("/search", files={"image": jpeg(500)}, data={"k": 1}).json()["results"]
        assert again[0]["image_id"] != first

    with running_service(home, database=databases.url_of(home)) as service:
        assert len(service.http.get("/verdicts").json()["verdicts"]) == 1


def test_what_is_indexed_meanwhile_is_found(home: Path, photos: Path, tiny_model: Path) -> None:
    index_files(home, tiny_model, photos)
    with running_service(home, database=databases.url_of(home)) as service:
        before = service.http.get("/collections/default").json()["images"]
        (new,) = write_pictures(photos, "later.jpg", seed=900)
        index_files(home, tiny_model, photos)
        assert service.http.get("/collections/default").json()["images"] == before + 1
        found = service.http.post("/search", files={"image": new.read_bytes()}, data={"k": 1}).json()["results"]
        assert Path(found[0]["path"]).name == "later.jpg"
