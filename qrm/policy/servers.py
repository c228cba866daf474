"""Servers that are asked over HTTP: which addresses are, and how."""

import ipaddress
from collections.abc import Mapping

import httpx

from qrm.data.comparisons import in_a_line


def parse(text: str) -> httpx.URL:
    """An address that may be asked.

    Raises:
      ValueError: it is none, has a password or a fragment in it, or others could read what is sent.
    """
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, ValueError) as error:
        raise ValueError(f'no URL ({in_a_line(error)})') from error
    if not url.host or url.userinfo or url.fragment:
        raise ValueError('expected a URL such as https://host/v1, without a password or a fragment')
    if not (url.scheme == 'https' or (url.scheme == 'http' and _is_loopback(url))):
        raise ValueError(f'{shown(url)}, expected https, or http of this machine itself, as what '
                         'is sent is not encrypted')
    return url


def client(url: httpx.URL, *, timeout: float, headers: Mapping[str, str] | None = None
           ) -> httpx.Client:
    """A client for a server; redirections are not followed."""
    # A proxy does not reach this machine.
    return httpx.Client(headers=headers, timeout=timeout, trust_env=not _is_loopback(url))


def shown(url: httpx.URL) -> str:
    """An address without what may be a secret in it."""
    return str(url.copy_with(query=None))


def _is_loopback(url: httpx.URL) -> bool:
    try:
        return url.host == 'localhost' or ipaddress.ip_address(url.host).is_loopback
    except ValueError:
        return False
