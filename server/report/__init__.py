"""The report of a run: one self-contained HTML page, a section a file."""

from fedge.server.report.page import render, write

__all__ = ["render", "write"]
