"""Several processes that train together: who they are, how they start, and how they end.

Each has a device. They are started by torchrun, by SLURM, or by the first process of each machine.
The first of all holds a connection to every other one: by it they are told what to train, and when
one ends, however it ends, the others hear of it at once, and end too. No clock decides that: only
where a whole machine is lost, the silence of its network does.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, TypeVar

import torch
import torch.distributed
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch._C._distributed_c10d import TCPStore

from runner.config import TrainerConfig
from runner.errors import ConfigError, InputError, RunError

T = TypeVar("T")
START = timedelta(minutes=5)  # in which all processes have to come
LATE = 60.0  # seconds that the first one, if it fails, waits for those that are still to come
GRACE = 5.0  # seconds in which a process can end by itself, once it has to
PATIENCE = 30.0  # the same, where the user has asked for it and files may be written
NEWS = 3.0  # seconds in which it is known that another process has ended
SILENCE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # 30 s: a machine is lost
INTERRUPTED = 130
STOPPING = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]  # the last is SLURM's, if it is asked
WHERE = "train.trainer"
FOLLOW = "from runner.cli import main; main()"


@dataclass(frozen=True)
class Place:
    """Where a process stands among those that train together.

    Attributes:
        rank: its number.
        n: how many there are.
        local: its number among those of its machine.
        n_local: how many there are on each machine.
        environment: tells Lightning the same.
        launches: whether it has to start the others of its machine.
    """

    rank: int
    n: int
    local: int
    n_local: int
    environment: ClusterEnvironment
    launches: bool = False

    @property
    def n_nodes(self) -> int:
        """How many machines there are."""
        return self.n // self.n_local

    @classmethod
    def of(cls, config: TrainerConfig) -> Place:
        """The place that torchrun or SLURM has given to this process, or else the first.

        Raises:
            ConfigError: so many processes were not asked for.
        """
        place = _given_place()
        if place is None:
            return _first_place(config)
        asked = place.n_local if config.devices == "auto" else _count(config)
        if asked != place.n_local or config.num_nodes not in (1, place.n_nodes):
            raise ConfigError(
                f"{place.n_local} processes a machine were started on {place.n_nodes} machines, "
                f"and the config asks for {asked} on {config.num_nodes}",
                where=f"{WHERE}.devices, {WHERE}.num_nodes",
                remedy='start as many, or leave both out: devices = "auto" takes what is there',
            )
        return place

    @classmethod
    def of_follower(cls) -> Place:
        """That of a process which another one has started."""
        place = _given_place()
        if place is None:
            raise ConfigError(
                "`runner follow` is what processes of one training are started by",
                remedy="use `runner train`",
            )
        return place


def _given_place() -> Place | None:
    """As the environment says, if somebody has started several processes."""
    known = os.environ
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if all(name in known for name in names):
        by_torchrun = TorchElasticEnvironment.detect()
        environment: ClusterEnvironment = (
            TorchElasticEnvironment() if by_torchrun else LightningEnvironment()
        )
        rank, n, local, n_local = (int(known[name]) for name in names)
        return Place(rank, n, local, n_local, environment)
    n = int(known.get("SLURM_STEP_NUM_TASKS", 1))  # set by srun, not in a script beside it
    if n == 1:
        return None
    n_local, uneven = divmod(n, int(known.get("SLURM_STEP_NUM_NODES", 1)))
    if uneven:
        raise ConfigError(
            f"SLURM has started {n} processes on {known['SLURM_STEP_NUM_NODES']} machines",
            where=WHERE,
            remedy="start as many on each: --ntasks-per-node",
        )
    try:
        environment = SLURMEnvironment(auto_requeue=False)
    except RuntimeError as error:
        raise ConfigError(f"Lightning refuses what SLURM has started: {error}") from None
    rank, local = int(known["SLURM_PROCID"]), int(known["SLURM_LOCALID"])
    return Place(rank, n, local, n_local, environment)


def _first_place(config: TrainerConfig) -> Place:
    """That of a process which starts the others of its machine."""
    n_local, node = _count(config), int(os.environ.get("NODE_RANK", 0))
    if config.num_nodes > 1 and not {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} <= set(os.environ):
        raise ConfigError(
            f"a training on {config.num_nodes} machines has to be started on each of them",
            where=f"{WHERE}.num_nodes",
            remedy="start it with srun or torchrun, see experiments/README.md; or set MASTER_ADDR, "
            "MASTER_PORT and NODE_RANK on each machine",
        )
    n = n_local * config.num_nodes
    return Place(node * n_local, n, 0, n_local, LightningEnvironment(), launches=n_local > 1)


def _count(config: TrainerConfig) -> int:
    """Devices of a machine that a config asks for."""
    devices = config.devices
    if isinstance(devices, list):
        return len(devices)
    if devices == "auto":
        return 1
    if isinstance(devices, str) and "," in devices:
        return len([number for number in devices.split(",") if number.strip()])
    if str(devices) == "-1":
        return max(torch.cuda.device_count(), 1)
    return int(devices) if str(devices).isdigit() else 1  # Lightning says what is wrong with it


@dataclass(frozen=True)
class Ending:
    """Why all processes have to end.

    Attributes:
        fields: of the error; none if the user has asked for it.
        said: whether the first process says it.
    """

    fields: Mapping[str, str] | None
    said: bool = True

    @property
    def code(self) -> int:
        """The exit code."""
        return INTERRUPTED if self.fields is None else 2

    def error(self) -> BaseException:
        """What is raised for it."""
        if self.fields is None:
            return KeyboardInterrupt()
        details = dict(self.fields)
        return RunError(details.pop("what"), **details)

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Ending:
        """What an error of one process means for the others."""
        if isinstance(error, KeyboardInterrupt):
            return cls(None)
        if isinstance(error, InputError):
            names = ("what", "where", "allowed", "remedy")
            return cls({name: getattr(error, name) for name in names})
        text = str(error).partition("\n")[0]
        return cls({"what": f"process {rank} failed: {type(error).__name__}: {text}"})


class Processes:
    """Those that train together, as one of them sees them; this one is alone.

    Attributes:
        place: of this one.
        at_end: is called where this process is ended from outside its main thread.
    """

    def __init__(self, place: Place) -> None:
        """Be in a place."""
        self.place = place
        self.at_end: Callable[[], None] = lambda: None

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.place.rank == 0

    def tell(self, task: Mapping[str, Any]) -> None:
        """Tell the others what to do."""

    def told(self) -> dict[str, Any]:
        """What the first one tells."""
        raise NotImplementedError

    def met(self, rank: int) -> bool:  # noqa: ARG002
        """Whether another one has come."""
        return True

    def leave(self, error: BaseException | None) -> BaseException | None:
        """End, with all others; gives the error that has ended them, wherever it came from."""
        return error


class _Connected(Processes):
    """One of several."""

    def __init__(self, place: Place, children: Mapping[int, subprocess.Popen[bytes]]) -> None:
        super().__init__(place)
        self.children = children
        self._ending: Ending | None = None
        self._must_end, self._left = threading.Event(), threading.Event()
        self._lock = threading.RLock()
        self._signals: socket.socket | None = None
        if threading.current_thread() is threading.main_thread():
            heard, self._signals = socket.socketpair()
            self._signals.setblocking(False)
            signal.set_wakeup_fd(self._signals.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(heard,), daemon=True).start()

    def _listen(self, heard: socket.socket) -> None:
        """End all when the user asks twice, also while the main thread waits for one that is stuck.

        Handlers in Python run in the main thread alone, between two of its instructions.
        """
        with heard:
            left = 2
            while left and (number := heard.recv(1)):
                left -= number[0] in STOPPING
        if not left:
            self._end(Ending(None))

    def _leave(self) -> None:
        """Not to be ended by force any more."""
        self._left.set()
        if self._signals is not None:
            signal.set_wakeup_fd(-1)
            self._signals.close()

    def _end(self, ending: Ending) -> None:
        """All have to end: this one by itself, or else by force, as it may wait for the others."""
        with self._lock:
            if self._ending is not None or self._left.is_set():
                return
            self._ending = ending
            self._announce(ending)
        self._must_end.set()
        threading.Thread(target=self._force, args=(ending,), daemon=True).start()

    def _announce(self, ending: Ending) -> None:
        """Let the others know."""

    def _force(self, ending: Ending) -> None:
        if self._left.wait(GRACE if ending.fields else PATIENCE):
            return
        if not self._silent(ending):
            print(f"error: {ending.error()}" if ending.fields else "interrupted", file=sys.stderr)
        with contextlib.suppress(Exception):
            self.at_end()
        for child in self.children.values():
            child.kill()
        os._exit(1 if self._silent(ending) else ending.code)

    def _silent(self, ending: Ending) -> bool:
        """Whether another process says why all end."""
        return not self.first and (ending.said or self.place.local > 1)

    def _cause(self, error: BaseException | None) -> Ending | None:
        """What has ended all, if it is known soon, where an error may only follow from it."""
        if isinstance(error, RuntimeError) or self._must_end.is_set():
            self._must_end.wait(NEWS)
        return self._ending


class _First(_Connected):
    """The one that all others are connected with."""

    def __init__(
        self, place: Place, store: TCPStore, children: Mapping[int, subprocess.Popen[bytes]]
    ) -> None:
        super().__init__(place, children)
        self._others: dict[int, Connection[bytes, bytes]] = {}
        self._ended: set[int] = set()
        self._all_here, self._all_ended = threading.Event(), threading.Event()
        self._closed = False
        self._task: bytes | None = None
        self._last_word: bytes | None = None
        key = secrets.token_bytes(16)
        self._listener = Listener(("" if place.n_nodes > 1 else "127.0.0.1", 0), authkey=key)
        port = self._listener.address[1]
        store.set("runner", json.dumps([os.environ["MASTER_ADDR"], port, key.hex()]))
        targets: list[tuple[Callable[..., None], tuple[Any, ...]]]
        targets = [(self._accept, ()), (self._await_all, ())]
        targets += [(self._watch, (rank, child)) for rank, child in children.items()]
        for target, arguments in targets:
            threading.Thread(target=target, args=arguments, daemon=True).start()

    def _accept(self) -> None:
        while len(self._others) < self.place.n - 1:
            try:
                connection = self._listener.accept()
                hello = json.loads(connection.recv_bytes())
            except (OSError, EOFError, AuthenticationError, ValueError):
                if self._closed:
                    return
                continue
            _keep_alive(connection)
            with self._lock:
                self._others[hello["rank"]] = connection
                for message in (self._task, self._last_word):
                    if message is not None:
                        connection.send_bytes(message)
            threading.Thread(target=self._hear, args=(connection, hello), daemon=True).start()
        self._all_here.set()
        self._listener.close()

    def _await_all(self) -> None:
        if not self._all_here.wait(START.total_seconds()):
            here = len(self._others) + 1
            what = f"{here} of {self.place.n} processes have come in {START.seconds // 60} minutes"
            self._end(Ending({"what": what, "where": WHERE}))

    def _hear(self, connection: Connection[bytes, bytes], hello: Mapping[str, Any]) -> None:
        """Listen to another process, until it ends."""
        rank = hello["rank"]
        try:
            said = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            self._died(rank, f"on {hello['host']}, process id {hello['pid']}")
            return
        if "fields" in said:
            self._end(Ending(said["fields"]))
        self._has_ended(rank)

    def _watch(self, rank: int, child: subprocess.Popen[bytes]) -> None:
        """Wait for the end of a process that was started here."""
        if child.wait() != 0:
            self._died(rank, f"process id {child.pid}")

    def _died(self, rank: int, who: str) -> None:
        if rank in self._ended:
            return
        child, how = self.children.get(rank), "is gone"
        if child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                how = _how_it_ended(child.wait(NEWS))
        self._end(
            Ending(
                {
                    "what": f"process {rank} of {self.place.n} ({who}) {how}, and a training goes "
                    "on with all of them or not at all",
                    "where": WHERE,
                    "remedy": "see what it has said; without a word, it was often memory that ran "
                    "out. --resume goes on from the last checkpoint",
                }
            )
        )

    def _has_ended(self, rank: int) -> None:
        with self._lock:
            self._ended.add(rank)
            if len(self._ended) == self.place.n - 1:
                self._all_ended.set()

    def _announce(self, ending: Ending) -> None:
        self._last_word = json.dumps({"fields": ending.fields, "end": True}).encode()
        self._tell_all(self._last_word)

    def _tell_all(self, message: bytes) -> None:
        with self._lock:
            for connection in self._others.values():
                with contextlib.suppress(OSError):
                    connection.send_bytes(message)

    def tell(self, task: Mapping[str, Any]) -> None:
        with self._lock:
            self._task = json.dumps(task).encode()
            self._tell_all(self._task)

    def met(self, rank: int) -> bool:
        return rank in self._others

    def leave(self, error: BaseException | None) -> BaseException | None:
        if error is None and not self._must_end.is_set():
            while not self._all_ended.wait(1.0) and not self._must_end.is_set():
                pass
        ending = self._cause(error)
        self._leave()
        if error is not None and ending is None:
            self._announce(Ending.of(error, 0))
        if error is not None and not self.children:
            self._all_here.wait(LATE)
        self._closed = True
        self._listener.close()
        for connection in self._others.values():
            connection.close()
        return error if ending is None or isinstance(error, InputError) else ending.error()


class _Other(_Connected):
    """One that is connected with the first."""

    def __init__(
        self, place: Place, store: TCPStore, children: Mapping[int, subprocess.Popen[bytes]]
    ) -> None:
        super().__init__(place, children)
        host, port, key = json.loads(store.get("runner"))
        self._connection = Client((host, port), authkey=bytes.fromhex(key))
        _keep_alive(self._connection)
        hello = {"rank": place.rank, "host": socket.gethostname(), "pid": os.getpid()}
        self._connection.send_bytes(json.dumps(hello).encode())
        self._tasks: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._hear, daemon=True).start()

    def _hear(self) -> None:
        try:
            while "end" not in (said := json.loads(self._connection.recv_bytes())):
                self._tasks.put(said)
            self._end(Ending(said["fields"]))
        except (EOFError, OSError):
            what = f"process 0 of {self.place.n} is gone, and so process {self.place.rank} ends"
            remedy = "--resume goes on from the last checkpoint"
            self._end(Ending({"what": what, "where": WHERE, "remedy": remedy}, said=False))
        self._tasks.put(None)

    def told(self) -> dict[str, Any]:
        task = self._tasks.get()
        if task is None:
            assert self._ending is not None
            raise self._ending.error()
        return task

    def leave(self, error: BaseException | None) -> BaseException | None:
        ending = self._cause(error)
        if ending is None:
            reason: dict[str, Any] = {}
            if error is not None:
                reason = {"fields": Ending.of(error, self.place.rank).fields}
            with contextlib.suppress(OSError):
                self._connection.send_bytes(json.dumps(reason).encode())
            if error is not None:  # the first one says it, if it can
                self._must_end.wait(GRACE)
                ending = self._ending
                if not isinstance(error, InputError | KeyboardInterrupt):
                    ending = None
        self._leave()
        if ending is None:
            return error
        return SystemExit(1) if self._silent(ending) else ending.error()


def _how_it_ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _keep_alive(connection: Connection[bytes, bytes]) -> None:
    """Let the system notice where the machine at the other end is lost."""
    with socket.socket(fileno=os.dup(connection.fileno())) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in SILENCE.items():
            if hasattr(socket, name):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


@contextlib.contextmanager
def together(place: Place) -> Iterator[Processes]:
    """Start the other processes of this machine, if nobody has, and meet all of them.

    When this is left with an error, in any of them, all end with it; otherwise the first one waits
    for all.
    """
    if place.n == 1:
        yield Processes(place)
        return
    with _surroundings(place), contextlib.ExitStack() as ends:
        with _reachable(place):
            store = _store(place)
            os.environ["MASTER_PORT"] = str(store.port)
            children = _launch(place) if place.launches else {}
            ends.callback(_stop, children, 2 * GRACE)
            processes = (_Other if place.rank else _First)(place, store, children)
        try:
            yield processes
        except BaseException as error:
            cause = processes.leave(error)
            _stop({rank: child for rank, child in children.items() if not processes.met(rank)}, 0.0)
            if cause is error or cause is None:
                raise
            raise cause from error
        if (cause := processes.leave(None)) is not None:
            raise cause
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _surroundings(place: Place) -> Iterator[None]:
    """What Lightning and torch are told by environment variables, until all is over."""
    before = dict(os.environ)
    os.environ |= {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.n),
        "LOCAL_RANK": str(place.local),
        "LOCAL_WORLD_SIZE": str(place.n_local),
        "NODE_RANK": str(place.rank // place.n_local),
        "MASTER_ADDR": place.environment.main_address,
    }
    if "OMP_NUM_THREADS" not in before:  # each takes its share of the cores
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = max(1, (cores or 1) // place.n_local)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _reachable(place: Place) -> Iterator[None]:
    """Say what to do where processes do not find each other."""
    try:
        yield
    except (torch.distributed.DistError, OSError, EOFError) as error:
        raise RunError(
            f"process {place.rank} of {place.n} does not find the first one: "
            f"{str(error).splitlines()[0]}",
            where=f"MASTER_ADDR={os.environ['MASTER_ADDR']}, "
            f"MASTER_PORT={os.environ.get('MASTER_PORT', place.environment.main_port)}",
            remedy="see whether the first one runs; another MASTER_PORT if this one is taken",
        ) from error


def _store(place: Place) -> TCPStore:
    """Where processes find each other; torch meets there too."""
    port = 0
    if place.rank > 0 or not place.launches or "MASTER_PORT" in os.environ:
        port = place.environment.main_port
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        os.environ["MASTER_ADDR"],
        port,
        place.n,
        is_master=place.rank == 0 and not by_agent,
        timeout=START,
        wait_for_workers=False,
        multi_tenant=True,
    )


def _launch(place: Place) -> dict[int, subprocess.Popen[bytes]]:
    """Start the other processes of this machine.

    Ctrl-C is for this process alone, which lets all end after the same batch.
    """
    command = [sys.executable, "-c", FOLLOW, "follow"]
    found = {}
    for local in range(1, place.n_local):
        rank = place.rank + local
        own = {"RANK": str(rank), "LOCAL_RANK": str(local), "PYTHONPATH": os.pathsep.join(sys.path)}
        found[rank] = subprocess.Popen(
            command,
            env=os.environ | own,
            stdin=subprocess.DEVNULL,
            stdout=sys.__stderr__,  # what is printed is for the first one to print
            start_new_session=True,
        )
    return found


def _stop(children: Mapping[int, subprocess.Popen[bytes]], patience: float) -> None:
    """Wait until processes have ended, not for long."""
    for child in children.values():
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def agreed(*wishes: bool) -> list[bool]:
    """Whether any of the processes wants something; all have to ask at the same time."""
    if not _several():
        return list(wishes)
    votes = torch.tensor(wishes, dtype=torch.uint8)
    torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX, group=_among_hosts())
    return [bool(vote) for vote in votes]


_HOSTS: list[Any] = []


def _among_hosts() -> Any:
    """A group whose messages wait for no GPU; none stands for all processes."""
    if torch.distributed.get_backend() == "gloo":
        return None
    if not _HOSTS:
        _HOSTS.append(torch.distributed.new_group(backend="gloo"))
    return _HOSTS[0]


def gathered(mine: T) -> list[T]:
    """What each process has, tensors and plain data, in order; all have to ask."""
    if not _several():
        return [mine]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    here = move_data_to_device(mine, torch.device("cpu"))
    torch.distributed.all_gather_object(found, here, group=_among_hosts())
    return found
