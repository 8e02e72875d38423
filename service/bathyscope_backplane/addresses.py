"""Which addresses are of the public internet: what a server names is connected to at these alone."""

from __future__ import annotations

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_REFUSED = tuple(
    ipaddress.ip_network(network)
    for network in (
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # Azure's host, reached from every guest
        "2002::/16",  # 6to4: carries an IPv4 address
        "2001::/23",  # protocol assignments, Teredo among them
        "3fff::/20",  # documentation (RFC 9637); not known to every Python that this runs on
    )
)


_MACHINES_OWN = tuple(
    ipaddress.ip_network(network)
    for network in ("169.254.0.0/16", "fe80::/10", "fd00:ec2::/32", "168.63.129.16/32", "100.100.100.200/32")
)


def is_machines_own(address: Address) -> bool:
    """Whether an address is link-local or of a cloud's service for its own machines, which hands out credentials."""
    address = _carried(address)
    return any(address in network for network in _MACHINES_OWN)


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, whichever IPv4 address an IPv6 one may carry."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = _carried(address)
        if inner is not address:
            return is_public(inner)
        if address not in _GLOBAL_V6:
            return False
    return address.is_global and not address.is_multicast and not any(address in network for network in _REFUSED)


def _carried(address: Address) -> Address:
    """The IPv4 address in an IPv6 one that is mapped or translated, else the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address
