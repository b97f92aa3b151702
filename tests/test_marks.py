"""The marks by which a quick run leaves tests out do not rot."""

import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


def test_what_starts_python_or_a_server_is_marked():
    with pytest.raises(AssertionError, match="is to be marked `process`"):
        subprocess.run([sys.executable, "-c", ""])
    with pytest.raises(AssertionError, match="is to be marked `process`"):
        ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)


@pytest.mark.parametrize(("name", "marked"), [("dit", False), ("flux", True)])
def test_what_is_asked_of_a_family_is_marked(request, name, marked):
    assert bool(request.node.get_closest_marker("family")) == marked
