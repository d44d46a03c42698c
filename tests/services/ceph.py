"""A Ceph object gateway on loopback: a production S3 server that is stricter than AWS in some things, laxer in others.

Needs, on Debian: apt-get install --no-install-recommends radosgw ceph-mon ceph-osd ceph-common
"""

import contextlib
import random
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["ceph_is_installed", "ceph_server"]

SCRIPT = Path(__file__).with_name("ceph-rgw.sh")
PROGRAMS = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "monmaptool", "curl")
PORTS = 64  # that the script uses from the first on


def ceph_is_installed() -> bool:
    return all(shutil.which(name) for name in PROGRAMS)


@contextlib.contextmanager
def ceph_server() -> Iterator[str]:
    """A gateway with its state in a temporary folder; its URL. Ready in about 13 seconds."""
    with tempfile.TemporaryDirectory(prefix="ceph-") as folder:
        state = str(Path(folder, "state"))
        try:
            for tries_left in (2, 1, 0):
                started = subprocess.run(
                    [SCRIPT, "start", state, str(_free_ports())], capture_output=True, text=True, check=False
                )
                if started.returncode == 0:
                    break
                subprocess.run([SCRIPT, "stop", state], check=False)
                if not tries_left:
                    raise RuntimeError(f"the Ceph gateway did not start: {started.stderr}")
            yield started.stdout.split()[-1]
        finally:
            subprocess.run([SCRIPT, "stop", state], check=False)


def _free_ports() -> int:
    # Below those that the system gives to clients.
    for first in random.sample(range(10_000, 32_000, PORTS), 50):
        with contextlib.suppress(OSError), socket.socket() as gateway, socket.socket() as monitor:
            gateway.bind(("127.0.0.1", first))
            monitor.bind(("127.0.0.1", first + 1))
            return first
    raise RuntimeError("no free ports")
