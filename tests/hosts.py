"""Several hosts on one machine: network namespaces on one switch, each with its own address, name and sshd.

Everything is inside of namespaces named after this process, so that two users do not collide, and the leftovers of one
that was killed are found and removed by the next.
"""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PREFIX = "lai"
INTERFACE = "eth0"
PROGRAMS = {"ip": "iproute2", "sshd": "openssh-server", "ssh-keygen": "openssh-client", "pdsh": "pdsh"}


def missing() -> str | None:
    """Why hosts cannot be made here; None where they can."""
    if os.geteuid() != 0:
        return "making hosts needs root"
    lacking = [package for program, package in PROGRAMS.items() if not shutil.which(program, path=_PATH)]
    if lacking:
        return f"making hosts needs Debian's {', '.join(lacking)}"
    trial = subprocess.run(["ip", "netns", "add", f"{PREFIX}{os.getpid()}-trial"], capture_output=True, text=True)
    _remove(f"{PREFIX}{os.getpid()}-trial")
    return f"no network namespaces here: {trial.stderr.strip()}" if trial.returncode else None


@dataclass(frozen=True)
class Hosts:
    """Hosts 0 to `count` - 1, at `address(host)`; what a launcher needs to reach them lies in `directory`."""

    directory: Path
    count: int

    @property
    def hostfile(self) -> Path:
        return self.directory / "hostfile"

    @property
    def ssh_config(self) -> Path:
        return self.directory / "ssh_config"

    def address(self, host: int) -> str:
        return f"10.77.0.{11 + host}"

    def name(self, host: int) -> str:
        return f"host{host}"

    def on(self, host: int, *command: str) -> list[str]:
        """The command line that runs `command` on a host."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name(host)]
        return ["ip", "netns", "exec", _namespace(host), *named, *command]

    def cut(self, host: int) -> None:
        """Take a host off the network: its link is dead, nobody is told."""
        _run("ip", "-n", _namespace("switch"), "link", "set", f"port{host}", "down")

    def join(self, host: int) -> None:
        """Put it back."""
        _run("ip", "-n", _namespace("switch"), "link", "set", f"port{host}", "up")


@contextmanager
def hosts(directory: Path, count: int) -> Iterator[Hosts]:
    """`count` hosts with one slot each, keys, a hostfile and an ssh config in `directory`; gone at the end."""
    _remove_leftovers()
    made = Hosts(directory, count)
    try:
        _make(made)
        yield made
    finally:
        for name in _namespaces(os.getpid()):
            _remove(name)


_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _namespace(host: int | str) -> str:
    return f"{PREFIX}{os.getpid()}-{host}"


def _make(made: Hosts) -> None:
    for key in ("host_key", "user_key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(made.directory / key))
    Path("/run/sshd").mkdir(exist_ok=True)
    switch = _namespace("switch")
    _run("ip", "netns", "add", switch)
    _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
    _run("ip", "-n", switch, "link", "set", "bridge", "up")
    for host in range(made.count):
        name, port = _namespace(host), f"port{host}"
        _run("ip", "netns", "add", name)
        _run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", name)
        _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
        _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", name, "addr", "add", f"{made.address(host)}/24", "dev", INTERFACE)
        _run("ip", "-n", name, "link", "set", INTERFACE, "up")
        options = {
            "ListenAddress": made.address(host),
            "AuthorizedKeysFile": made.directory / "user_key.pub",
            "PermitRootLogin": "yes",
            "StrictModes": "no",
            "UsePAM": "no",
            "PidFile": "none",
        }
        settings = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        sshd = str(shutil.which("sshd", path=_PATH))
        _run(*made.on(host, sshd, "-f", "/dev/null", "-h", str(made.directory / "host_key"), *settings))
    made.hostfile.write_text("".join(f"{made.address(host)} slots=1\n" for host in range(made.count)))
    made.ssh_config.write_text(
        f"StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nIdentityFile {made.directory / 'user_key'}\n"
        "LogLevel ERROR\nServerAliveInterval 5\nServerAliveCountMax 3\n"
    )


def _namespaces(process: int | str) -> list[str]:
    return re.findall(rf"^{PREFIX}{process}-\w+", _run("ip", "netns", "list"), re.MULTILINE)


def _remove(name: str) -> None:
    """A namespace with all processes in it, which nobody but this module put there."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    for process in found.stdout.split():
        try:
            os.kill(int(process), signal.SIGKILL)
        except ProcessLookupError:
            continue
    subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _remove_leftovers() -> None:
    for name in _namespaces(r"\d+"):
        owner = int(name.removeprefix(PREFIX).split("-")[0])
        if owner == os.getpid() or not Path(f"/proc/{owner}").exists():
            _remove(name)
