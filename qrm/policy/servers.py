"""Servers that are asked over HTTP: which addresses are, and how."""

import ipaddress
import os
from collections.abc import Mapping

import httpx

from qrm.data.comparisons import in_a_line


def parse(text: str, *, private: bool = True) -> httpx.URL:
    """An address that may be asked.

    Args:
      text: the address.
      private: nobody else may read what is sent, such as a token.

    Raises:
      ValueError: it is none, has a password or a fragment in it, or others could read what is sent.
    """
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, ValueError) as error:
        raise ValueError(f'no URL ({in_a_line(error)})') from error
    if not url.host or url.userinfo or url.fragment:
        raise ValueError('expected a URL such as https://host/v1, without a password or a fragment')
    plain = url.scheme == 'http' and (_is_loopback(url) or not private)
    if not (url.scheme == 'https' or plain):
        raise ValueError(f'{shown(url)}, expected https, or http of this machine itself, as what '
                         'is sent is not encrypted')
    return url


def token(variable: str) -> str:
    """The token that an environment variable holds; of none ''.

    Raises:
      ValueError: there is no token in it.
    """
    found = os.environ.get(variable, '') if variable else ''
    if variable and (not found.isascii() or not found.isprintable() or ' ' in found or not found):
        raise ValueError(f'environment variable {variable}: '
                         f'{"no" if found else "not set, expected a"} token')
    return found


def client(url: httpx.URL, *, timeout: float, token: str = '',
           headers: Mapping[str, str] | None = None) -> httpx.Client:
    """A client for a server, which is told the token; redirections are not followed."""
    bearer = {'Authorization': f'Bearer {token}'} if token else {}
    # A proxy does not reach this machine.
    return httpx.Client(headers={**(headers or {}), **bearer}, timeout=timeout,
                        trust_env=not _is_loopback(url))


def shown(url: httpx.URL) -> str:
    """An address without what may be a secret in it."""
    return str(url.copy_with(query=None))


def _is_loopback(url: httpx.URL) -> bool:
    try:
        return url.host == 'localhost' or ipaddress.ip_address(url.host).is_loopback
    except ValueError:
        return False
