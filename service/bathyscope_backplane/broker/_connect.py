"""Redis by URL: one server, a unix socket, sentinels or a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import FullJitterBackoff

from bathyscope.errors import SetupError

_PORTS = {"sentinel": 26379, "cluster": 6379}
_TLS = {"ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_password", "ssl_check_hostname"}
"""Options of a URL that redis-py reads itself for one server, and leaves to us for sentinels and clusters."""
_SAME = {"valkey": "redis", "valkeys": "rediss", "valkey+unix": "unix", "redis+unix": "unix"}


def connect(
    url: str,
    *,
    timeout_s: float = 5.0,
    retries: int = 6,
    max_connections: int = 64,
    options: Mapping[str, Any] | None = None,
) -> Redis | RedisCluster:
    """A client for the backplane; nothing is sent before its first command. Close it with `aclose`.

    - `redis://[user:password@]host[:port][/db]`, `rediss://…` with TLS, `valkey://…`, `valkeys://…`
    - `unix:///path/to/socket`, `valkey+unix:///path/to/socket`
    - `redis+sentinel://[user:password@]host[:port],host[:port]…/service[/db]`, `rediss+sentinel://…`; the password
      is the server's, that of the sentinels is `?sentinel_password=`
    - `redis+cluster://[user:password@]host[:port],host[:port]…`, `rediss+cluster://…`

    A private certificate authority is named by `?ssl_ca_certs=/path/to/ca.pem`, a certificate of our own by
    `ssl_certfile` and `ssl_keyfile`, in each of these.

    A command that meets a broken connection is sent again up to `retries` times over about three seconds, so that a
    restart or failover passes unnoticed. Connecting, and waiting for one reply, end after `timeout_s` seconds.
    When all `max_connections` are busy a command waits for one. `options` go to redis-py as they are.

    Raises `SetupError` for a URL that is none of these.
    """
    # No `protocol=`: with an explicit 3, redis-py changes the shape of several replies.
    common: dict[str, Any] = {
        "decode_responses": True,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(FullJitterBackoff(base=0.05, cap=1.0), retries),
        **_without_maintenance(),
        **(options or {}),
    }
    scheme, plus, kind = urlsplit(url).scheme.partition("+")
    if kind in _PORTS and scheme in {"redis", "rediss", "valkey", "valkeys"}:
        common |= _credentials(url)
        if scheme in {"rediss", "valkeys"}:
            common |= {"ssl": True, **_tls(url)}
        make = _sentinel if kind == "sentinel" else _cluster
        return make(url, common, max_connections)
    split = urlsplit(url)
    url = urlunsplit(split._replace(scheme=_SAME.get(scheme + plus + kind, split.scheme)))
    common |= {"socket_keepalive": True} if not url.startswith("unix:") else {}
    try:
        pool = BlockingConnectionPool.from_url(url, max_connections=max_connections, timeout=timeout_s, **common)
    except ValueError as error:
        raise SetupError(
            "The Redis URL must begin with redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://"
            f" ({error})."
        ) from error
    return Redis.from_pool(pool)


def _without_maintenance() -> dict[str, Any]:
    """Maintenance notices of Redis Enterprise off: with them, redis-py 8 sends one command more at each connect and
    does not check any more whether a pooled connection still holds an unread reply.
    """
    try:
        import redis.asyncio.maint_notifications  # noqa: F401
        from redis.maint_notifications import MaintNotificationsConfig
    except ImportError:  # redis-py before 8
        return {}
    return {"maint_notifications_config": MaintNotificationsConfig(enabled=False)}


def _sentinel(url: str, common: dict[str, Any], max_connections: int) -> Redis:
    split = urlsplit(url)
    service, _, db = split.path.strip("/").partition("/")
    if not service:
        raise SetupError("A sentinel URL ends with the name of the service: redis+sentinel://host:port/service.")
    if db:
        if not db.isdecimal():
            raise SetupError("After the service, a sentinel URL may name a database, which is a number.")
        common["db"] = int(db)
    query = dict(parse_qsl(split.query))
    shared = {"socket_timeout", "socket_connect_timeout", "ssl", *_TLS}
    of_sentinels: dict[str, Any] = {name: value for name, value in common.items() if name in shared}
    of_sentinels |= {
        name: query[f"sentinel_{name}"] for name in ("username", "password") if f"sentinel_{name}" in query
    }
    # Asking a sentinel that is down must be quick: the next one is asked then, and a round without an answer is
    # tried again by the connection that wants to know.
    of_sentinels["retry"] = Retry(FullJitterBackoff(base=0.05, cap=0.2), 1)
    manager = Sentinel(_hosts(url, "sentinel"), sentinel_kwargs=of_sentinels, **common)  # type: ignore[no-untyped-call]
    client: Redis = manager.master_for(service, max_connections=max_connections, connection_pool_class=_SentinelPool)
    return client


class _SentinelPool(SentinelConnectionPool):
    """Closes the connections to the sentinels with its own; redis-py leaves them open."""

    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        if inuse_connections:
            for sentinel in self.sentinel_manager.sentinels:
                await sentinel.aclose()


def _cluster(url: str, common: dict[str, Any], max_connections: int) -> RedisCluster:
    if not hasattr(RedisCluster, "pubsub"):
        raise SetupError("A Redis cluster needs redis-py 8 or later: pip install 'redis>=8'.")
    nodes = [ClusterNode(host, port) for host, port in _hosts(url, "cluster")]
    return RedisCluster(startup_nodes=nodes, max_connections=max_connections, **common)


def _tls(url: str) -> dict[str, Any]:
    given: dict[str, Any] = {name: value for name, value in parse_qsl(urlsplit(url).query) if name in _TLS}
    if "ssl_check_hostname" in given:
        given["ssl_check_hostname"] = given["ssl_check_hostname"].lower() not in {"false", "0", "no"}
    return given


def _credentials(url: str) -> dict[str, str]:
    user, at, _ = urlsplit(url).netloc.rpartition("@")
    if not at:
        return {}
    name, _, password = user.partition(":")
    found = {"username": unquote(name), "password": unquote(password)}
    return {key: value for key, value in found.items() if value}


def _hosts(url: str, kind: str) -> list[tuple[str, int]]:
    hosts = []
    for part in urlsplit(url).netloc.rpartition("@")[2].split(","):
        try:
            one = urlsplit(f"//{part}")
            host, port = one.hostname, one.port or _PORTS[kind]
        except ValueError as error:
            raise SetupError(f"{part!r} in the Redis URL is not host:port.") from error
        if not host:
            raise SetupError(f"A {kind} URL names its hosts: redis+{kind}://host:port,host:port.")
        hosts.append((host, port))
    return hosts
