"""One HTML page from the JSON record of a command: no network, dark and light, readable on a phone."""

from .page import page, write_report

__all__ = ["page", "write_report"]
