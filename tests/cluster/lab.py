"""A cluster on one machine: hosts with a name, processes and a network of their own, and a real Slurm over them.

Every host is a set of namespaces held by one process; when that is killed, the kernel ends all that runs there, and
nothing is left behind. Hosts share the file system. Needs root and
Debian's packages of Slurm.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

BIN = Path(sys.executable).parent
SLURM = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2", "util-linux")
SSH = ("openssh-server", "openssh-client", "pdsh")
ACCOUNTING = ("slurmdbd", "slurm-wlm-mysql-plugin", "mariadb-server")
CONTROLLER = "ctl"
_SUBNET = "10.213.7"
_END_WITH_US = ("setpriv", "--pdeathsig=KILL")  # whatever ends the tests
_SECOND_SUBNET = "10.213.8"
_FIRST = 8  # of the controller: the second node is .10, which as a text comes before the first one's .9
_START_SECONDS = 60
_CPUS = 4  # that each node claims; in truth they share what there is


class Unfit(Exception):  # noqa: N818  a reason to skip
    """This machine cannot be a cluster."""


def require(packages: Sequence[str]) -> None:
    """Have Debian's `packages`, or raise `Unfit` with a word that says why not.

    They are installed where the variable MEGALITE_TEST_INSTALL is 1, as `make test-cluster` and .ci/run have it.
    """
    if os.geteuid() != 0:
        raise Unfit("needs root, for namespaces and Slurm's daemons")
    if shutil.which("dpkg-query") is None:
        raise Unfit("needs Debian's packages of Slurm")
    shown = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${Package} ${Status}\n", *packages], capture_output=True, text=True
    )
    missing = [name for name in packages if f"{name} install ok installed" not in shown.stdout.splitlines()]
    if not missing:
        return
    if os.environ.get("MEGALITE_TEST_INSTALL") != "1":
        raise Unfit(f"needs Debian's packages {', '.join(missing)}: install them, or set MEGALITE_TEST_INSTALL=1")
    policy = Path("/usr/sbin/policy-rc.d")
    is_ours = not policy.exists()
    if is_ours:  # or the packages would start daemons of their own
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *missing]):
            done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True)
            if done.returncode:
                raise Unfit(f"apt-get {command[0]} of {', '.join(missing)} failed: {done.stderr[-300:]}")
    finally:
        if is_ours:
            policy.unlink()


def wait_until(condition: Callable[[], object], seconds: float, what: str | Callable[[], str]) -> None:
    """Poll until `condition()` holds; fails the test with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what if isinstance(what, str) else what()
        time.sleep(0.1)


class Hosts:
    """Hosts `names`, each with the address `address(name)` in a network that only they are in."""

    def __init__(self, folder: Path, names: Sequence[str]):
        require(("iproute2", "util-linux"))
        self.folder, self.names = folder, list(names)
        self._keepers: dict[str, tuple[subprocess.Popen[bytes], int]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{self.address(name)} {name}" for name in self.names)]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        try:
            for name in self.names:
                self._keepers[name] = self._keep(name)
            self._connect()
        except BaseException:
            self.close()
            raise

    def address(self, name: str) -> str:
        """The host's IP address."""
        return f"{_SUBNET}.{_FIRST + self.names.index(name)}"

    def close(self) -> None:
        """End every process of every host."""
        for keeper, inner in self._keepers.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(inner, signal.SIGKILL)  # the first process of its namespace: all others end with it
            keeper.wait()
        self._keepers.clear()

    def command(self, name: str, *words: str) -> list[str]:
        """`words` as a command that runs on the host."""
        return ["nsenter", f"--target={self._keepers[name][1]}", "--uts", "--mount", "--pid", "--net", "--", *words]

    def run(self, name: str, *words: str, seconds: float = 60, check: bool = True) -> str:
        """What a command prints on the host."""
        done = subprocess.run(self.command(name, *words), capture_output=True, text=True, timeout=seconds, check=False)
        assert done.returncode == 0 or not check, f"{' '.join(words)} on {name}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self, name: str, *words: str, log: Path, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
        """Start a command on the host, writing to `log`."""
        with open(log, "ab") as output:
            return subprocess.Popen(
                self.command(name, *words), env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip

    def processes(self, name: str, part: str) -> list[int]:
        """The pids, as this machine counts them, of the host's processes with `part` on their command line."""
        namespace = os.readlink(f"/proc/{self._keepers[name][1]}/ns/pid")
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if part in line and os.readlink(path / "ns/pid") == namespace:
                    found.append(int(path.name))
        return found

    def cut(self, name: str) -> None:
        """Pull the host's plug out of the network."""
        self.run(name, "ip", "link", "set", "eth0", "down")

    def mend(self, name: str) -> None:
        """Put it back."""
        self.run(name, "ip", "link", "set", "eth0", "up")

    def _keep(self, name: str) -> tuple["subprocess.Popen[bytes]", int]:
        begin = 'hostname "$0"; mount --bind "$1" /etc/hosts; ip link set lo up; exec sleep infinity'
        namespaces = ["--uts", "--mount", "--pid", "--net", "--fork", "--kill-child", "--mount-proc"]
        keeper = subprocess.Popen(
            [*_END_WITH_US, "unshare", *namespaces, "sh", "-c", begin, name, str(self.folder / "hosts")],
            start_new_session=True,
        )
        children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children")
        wait_until(lambda: children.read_text().split(), 10, f"{name} does not start")
        pid = int(children.read_text().split()[0])
        wait_until(lambda: b"infinity" in Path(f"/proc/{pid}/cmdline").read_bytes(), 10, f"{name} does not start")
        return keeper, pid

    def _connect(self) -> None:
        """Two networks, the one of the hosts' names and a second. The machine itself has no leg on them."""
        first = self.names[0]
        for interface, subnet in (("eth0", _SUBNET), ("eth1", _SECOND_SUBNET)):
            bridge = f"bridge-{interface}"  # in the namespace of the first host
            self._ip(first, "link", "add", bridge, "type", "bridge")
            self._ip(first, "link", "set", bridge, "up")
            for number, name in enumerate(self.names):
                end = f"{interface}-end{number}"
                self._ip(name, "link", "add", interface, "type", "veth", "peer", "name", end)
                if name != first:
                    self._ip(name, "link", "set", end, "netns", str(self._keepers[first][1]))
                self._ip(first, "link", "set", end, "master", bridge, "up")
                self._ip(name, "address", "add", f"{subnet}.{_FIRST + number}/24", "dev", interface)
                self._ip(name, "link", "set", interface, "up")

    def _ip(self, name: str, *words: str) -> None:
        """In the host's network alone: pids are those of this machine."""
        subprocess.run(["nsenter", f"--target={self._keepers[name][1]}", "--net", "ip", *words], check=True)


def serve_ssh(hosts: Hosts) -> dict[str, str]:
    """Run sshd on every host; returns the variables with which a process on any of them reaches all by ssh and pdsh.

    Keys and settings lie below `hosts.folder`; those of this machine and of its user are not looked at.
    """
    require(SSH)
    folder = hosts.folder / "ssh"
    (folder / "bin").mkdir(parents=True)
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    host_key = (folder / "host_key.pub").read_text().rpartition(" ")[0]
    (folder / "known_hosts").write_text("".join(f"{name},{hosts.address(name)} {host_key}\n" for name in hosts.names))
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\nPidFile none\nUseDNS no\n"
    )
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder}/user_key\nIdentitiesOnly yes\nUserKnownHostsFile {folder}/known_hosts\n"
        "GlobalKnownHostsFile /dev/null\nStrictHostKeyChecking yes\nLogLevel ERROR\n"
    )
    # DeepSpeed's launcher calls ssh itself, without the options that pdsh would give it.
    (folder / "bin/ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    (folder / "bin/ssh").chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}/bin{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"}
    for name in hosts.names:
        hosts.run(name, "sh", "-c", "mount -t tmpfs tmpfs /run && mkdir /run/sshd")  # which sshd wants
        sshd = ("/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config"))
        hosts.start(name, *sshd, log=folder / f"sshd_{name}.log", environment=environment)
    for name in hosts.names:
        login = hosts.command(hosts.names[0], "ssh", name, "true")
        wait_until(
            lambda login=login: subprocess.run(login, env=environment, capture_output=True).returncode == 0,
            20, lambda name=name: (folder / f"sshd_{name}.log").read_text(),
        )  # fmt: skip
    return environment


class Slurm:
    """A controller and nodes, with the commands of Slurm to talk to them; everything lies below `folder`."""

    def __init__(
        self, folder: Path, nodes: Sequence[str] = ("nodea", "nodeb"), cpus: int = 4, accounting: bool = False
    ):
        require((*SLURM, *(ACCOUNTING if accounting else ())))
        self.folder, self.nodes, self.has_accounting = folder, list(nodes), accounting
        self.hosts = Hosts(folder, [CONTROLLER, *nodes])
        self._munged = 0
        try:
            for name in ("log", "state", "spool", "munge"):
                (folder / name).mkdir()
            self._start_munge()
            (folder / "slurm.conf").write_text(self._configuration())
            if accounting:
                self._start_accounting()
            self._daemon(CONTROLLER, "slurmctld", "-D", "-f", str(folder / "slurm.conf"))
            for node in nodes:
                self._daemon(node, "slurmd", "-D", "-N", node, "-f", str(folder / "slurm.conf"))
            idle = ("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N")
            wait_until(lambda: set(self._try(*idle).split()) == set(nodes), _START_SECONDS, self._why)
        except BaseException:
            self.close()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """What a user of this cluster has: its configuration, and this Python first on PATH."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MEGALITE_"))}
        return kept | {
            "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def user(self, *words: str, cwd: Path, seconds: float = 300) -> "subprocess.CompletedProcess[str]":
        """Run a command as a user on the controller's host would."""
        return subprocess.run(
            self.hosts.command(CONTROLLER, "sh", "-c", 'cd "$0" && exec "$@"', str(cwd), *words), env=self.environment,
            capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip

    def ask(self, *words: str) -> str:
        """What a command of Slurm prints."""
        done = self.user(*words, cwd=self.folder, seconds=30)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """A job's state in Slurm's words."""
        shown = self._try("scontrol", "--oneliner", "show", "job", job)
        return shown.partition("JobState=")[2].partition(" ")[0]

    def wait_for(self, job: str, seconds: float, *states: str) -> str:
        """Until the job is in one of `states`, or else has ended; returns which."""
        ended = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        wait_until(lambda: self.state(job) in ended, seconds, lambda: f"job {job} is {self.state(job)}\n{self._why()}")
        return self.state(job)

    def close(self) -> None:
        """End everything."""
        self._try("scancel", "--user=root")
        self.hosts.close()
        if self._munged:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._munged, signal.SIGTERM)

    def _try(self, *words: str) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.user(*words, cwd=self.folder, seconds=10).stdout
        return ""

    def _daemon(self, host: str, *words: str, **variables: str) -> None:
        environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")} | variables
        self.hosts.start(host, *words, log=self.folder / "log" / f"{words[0]}-{host}.out", environment=environment)

    def _why(self) -> str:
        """The ends of the daemons' logs."""
        logs = sorted((self.folder / "log").iterdir())
        return "\n".join(f"{path.name}: {path.read_text(errors='replace')[-600:]}" for path in logs)

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.chmod(0o711)  # no more, or munged refuses the folder
        (folder / "key").write_bytes(secrets.token_bytes(1024))
        (folder / "key").chmod(0o400)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        subprocess.run(["munged", "--force", f"--log-file={self.folder / 'log/munged.log'}", *options], check=True)
        wait_until((folder / "pid").is_file, 10, "munged does not start")
        self._munged = int((folder / "pid").read_text())

    def _start_accounting(self) -> None:
        """slurmdbd on a MariaDB of its own, so that sacct answers."""
        folder = self.folder / "mysql"
        socket, address = self.folder / "mysql.sock", self.hosts.address(CONTROLLER)
        subprocess.run(
            ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={folder}", "--skip-test-db",
             "--auth-root-authentication-method=normal"], check=True, capture_output=True,
        )  # fmt: skip
        self._daemon(
            CONTROLLER, "mariadbd", "--no-defaults", "--user=root", f"--datadir={folder}", f"--socket={socket}",
            "--bind-address=127.0.0.1", "--port=17306", "--innodb-buffer-pool-size=64M",
            "--innodb-lock-wait-timeout=900",
        )  # fmt: skip
        client = ["mariadb", "--no-defaults", f"--socket={socket}"]
        grant = (
            "create database slurm_acct; create user slurm@'127.0.0.1' identified by 'slurm'; "
            "create user slurm@localhost identified by 'slurm'; grant all on slurm_acct.* to slurm@'127.0.0.1'; "
            "grant all on slurm_acct.* to slurm@localhost;"
        )
        ping = [*client, "--execute=select 1"]
        wait_until(lambda: subprocess.run(ping, capture_output=True, check=False).returncode == 0, 30, self._why)
        subprocess.run([*client, f"--execute={grant}"], check=True)
        lines = {
            "AuthType": "auth/munge", "AuthInfo": f"socket={self.folder}/munge/socket", "DbdHost": CONTROLLER,
            "DbdAddr": address, "DbdPort": 17819, "SlurmUser": "root", "LogFile": f"{self.folder}/log/slurmdbd.log",
            "PidFile": f"{self.folder}/slurmdbd.pid", "StorageType": "accounting_storage/mysql",
            "StorageHost": "127.0.0.1", "StoragePort": 17306, "StorageUser": "slurm", "StoragePass": "slurm",
            "StorageLoc": "slurm_acct",
        }  # fmt: skip
        (self.folder / "slurmdbd.conf").write_text("".join(f"{key}={value}\n" for key, value in lines.items()))
        (self.folder / "slurmdbd.conf").chmod(0o600)
        self._daemon(CONTROLLER, "slurmdbd", "-D", SLURM_CONF=str(self.folder / "slurmdbd.conf"))
        wait_until(lambda: "lab" in self._try("sacctmgr", "--immediate", "add", "cluster", "lab"), 30, self._why)

    def _configuration(self) -> str:
        folder, address = self.folder, self.hosts.address
        memory = 2000 * _CPUS
        lines = {
            "ClusterName": "lab", "SlurmctldHost": f"{CONTROLLER}({address(CONTROLLER)})", "SlurmctldPort": 17817,
            "SlurmUser": "root", "SlurmdUser": "root", "AuthType": "auth/munge", "CryptoType": "crypto/munge",
            # A short life of credentials lets a requeued job start at once instead of after two minutes.
            "AuthInfo": f"socket={folder}/munge/socket,cred_expire=5",
            "SlurmctldPidFile": f"{folder}/slurmctld.pid", "SlurmctldLogFile": f"{folder}/log/slurmctld.log",
            "SlurmdPidFile": f"{folder}/slurmd-%n.pid", "SlurmdLogFile": f"{folder}/log/slurmd-%n.log",
            "SlurmdSpoolDir": f"{folder}/spool/%n", "StateSaveLocation": f"{folder}/state",
            "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none", "SwitchType": "switch/none",
            "JobAcctGatherType": "jobacct_gather/none", "MpiDefault": "none", "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU_Memory", "DefMemPerCPU": memory // _CPUS,
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "bf_interval=2,batch_sched_delay=0,sched_min_interval=0",
            "SlurmdParameters": "config_overrides", "ReturnToService": 2, "SlurmdTimeout": 30, "SlurmctldTimeout": 15,
            "MessageTimeout": 10, "InactiveLimit": 0, "KillWait": 10, "CompleteWait": 0,
            # A step that was cut off tries for a minute to tell of its end; else its node would be drained.
            "UnkillableStepTimeout": 120,
            "MinJobAge": 3600, "JobRequeue": 1, "UsePAM": 0, "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
        }  # fmt: skip
        if self.has_accounting:
            lines |= {
                "AccountingStorageType": "accounting_storage/slurmdbd", "AccountingStorageHost": address(CONTROLLER),
                "AccountingStoragePort": 17819, "AccountingStoragePass": f"{folder}/munge/socket",
            }  # fmt: skip
        else:
            lines["AccountingStorageType"] = "accounting_storage/none"
        text = "".join(f"{key}={value}\n" for key, value in lines.items())
        for node in self.nodes:
            text += (
                f"NodeName={node} NodeHostname={node} NodeAddr={address(node)} Port=17818 CPUs={_CPUS} "
                f"RealMemory={memory} State=UNKNOWN\n"
            )
        text += f"PartitionName=debug Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP GraceTime=60\n"
        return text + f"PartitionName=urgent Nodes={','.join(self.nodes)} MaxTime=INFINITE State=UP PriorityTier=9\n"


@contextlib.contextmanager
def slurm(folder: Path, **options: object) -> Iterator[Slurm]:
    """A running Slurm below `folder`; ended with the block, whatever happens in it."""
    cluster = Slurm(folder, **options)  # type: ignore[arg-type]
    try:
        yield cluster
    finally:
        cluster.close()
