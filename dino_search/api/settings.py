"""`ServiceSettings`: everything that can be set about the service, from flags, the environment and a TOML file."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from dino_index.errors import SettingsInvalid
from dino_index.image_bytes import ReadLimits
from dino_search.home import default_home

PREFIX = "DINO_SEARCH_"
CONFIG_VARIABLE = "DINO_SEARCH_CONFIG"

Texts = Annotated[tuple[str, ...], NoDecode]
"""In the environment: separated by commas."""


class ServiceSettings(BaseSettings):
    """Settings of one service. The environment names each as `DINO_SEARCH_` and its name in capitals.

    What is given to the constructor goes before the environment, and that before the file. Unknown keys are errors.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, env_ignore_empty=True, use_attribute_docstrings=True
    )

    home: Path = Field(default_factory=default_home)
    """Folder of catalog, indexes and models."""
    database: str | None = None
    """URL of a PostgreSQL database that holds the catalog; none: an SQLite file in the home."""
    vector_store: str | None = None
    """URL of a Milvus server that searches the vectors; none: index files in the home."""
    collection: str = "default"
    """The collection that requests mean which name none."""
    host: str = "127.0.0.1"
    """Address to listen on; other than this machine's own only with keys."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the models run."""
    allow_public_without_keys: bool = False
    """Listen on a public address although anybody could then do everything."""
    keys: Literal["auto", "required", "off"] = "auto"
    """Whether requests need an API key; auto: as soon as the catalog has one."""
    max_body_bytes: int = Field(default=64 * 2**20, ge=1024)
    """Refuse larger requests."""
    max_pixels: int = Field(default=200_000_000, ge=1)
    """Refuse pictures that claim more, before they are decoded."""
    max_k: int = Field(default=1000, ge=1)
    """Most results that a request may ask for."""
    max_batch_images: int = Field(default=64, ge=1)
    """Most pictures in one request."""
    queue_size: int = Field(default=64, ge=1)
    """Pictures that may wait for a forward pass; requests beyond that are refused."""
    max_wait_ms: float = Field(default=5.0, ge=0, le=1000)
    """How long a forward pass on a GPU may wait for pictures that are being decoded, to take them along."""
    request_timeout_s: float = Field(default=60.0, gt=0)
    """A request that takes longer is given up."""
    body_timeout_s: float = Field(default=20.0, gt=0)
    """How long a client may keep silent while it sends a request."""
    drain_s: float = Field(default=30.0, ge=0)
    """How long requests may go on after the service was told to stop."""
    thumbnail_cache_bytes: int = Field(default=64 * 2**20, ge=0)
    """Memory for thumbnails."""
    fetch_urls: bool = False
    """Fetch the pictures of `image_url`, from `fetch_hosts` only."""
    fetch_hosts: Texts = ()
    """Hosts that pictures may be fetched from."""
    fetch_timeout_s: float = Field(default=10.0, gt=0)
    """A picture that takes longer is given up."""
    fetch_max_bytes: int = Field(default=32 * 2**20, ge=1)
    """Refuse larger pictures from URLs."""
    index_folders: Annotated[tuple[Path, ...], NoDecode] = ()
    """Folders of this machine that jobs may index."""
    cors_origins: Texts = ()
    """Origins whose pages may use the API; none: only its own."""
    log_format: Literal["text", "json"] = "text"
    """How log lines look."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged."""
    max_jobs: int = Field(default=1, ge=1)
    """Jobs that run at a time."""
    preload: Texts = ()
    """Collections that are loaded before the service is ready; none: `collection`, where it exists."""

    @field_validator("fetch_hosts", "index_folders", "cors_origins", "preload", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("home")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources: list[PydanticBaseSettingsSource] = [init_settings, env_settings]
        if config := os.environ.get(CONFIG_VARIABLE):
            sources.append(TomlConfigSettingsSource(settings_cls, toml_file=Path(config).expanduser()))
        return tuple(sources)

    @classmethod
    def load(cls, config: Path | None = None, **given: Any) -> ServiceSettings:
        """The settings of this process. config: a TOML file; None for `DINO_SEARCH_CONFIG`, where that is set.

        given: goes before everything else; what is None counts as not given.
        Raises SettingsInvalid, which names the field, the value and what is allowed.
        """
        before = os.environ.get(CONFIG_VARIABLE)
        place = config or (Path(before).expanduser() if before else None)
        if place is not None and not place.is_file():
            raise SettingsInvalid(f"expected a TOML file with settings, found none at {place}")
        try:
            if config is not None:
                os.environ[CONFIG_VARIABLE] = str(config)
            return cls(**{name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            problems = "; ".join(_in_words(problem) for problem in error.errors(include_url=False))
            raise SettingsInvalid(f"the settings cannot be used: {problems}") from error
        except (ValueError, OSError) as error:  # tomllib's errors are ValueErrors
            raise SettingsInvalid(f"the settings file {place} cannot be read: {error}") from error
        finally:
            if config is not None:
                if before is None:
                    os.environ.pop(CONFIG_VARIABLE, None)
                else:
                    os.environ[CONFIG_VARIABLE] = before

    @property
    def limits(self) -> ReadLimits:
        """Of one picture."""
        return ReadLimits(max_bytes=self.max_body_bytes, max_pixels=self.max_pixels)

    @property
    def is_public(self) -> bool:
        """Whether other machines can reach the address."""
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() != "localhost"


def _in_words(problem: Any) -> str:
    name = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"{name} is no setting"
    found = "" if name in ("database", "vector_store") else f", found {problem['input']!r}"
    return f"{name} ({PREFIX}{name.upper()}): {problem['msg']}{found}"
