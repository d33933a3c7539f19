"""Machines are made ready: what is installed, what is skipped, what is repaired, and what is said when it can't be."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import skyward as sky
from skyward.cluster import remote
from skyward.cluster.bootstrap import Bootstrap
from skyward.environment.wheels import pack
from skyward.scripts.apt import debian_packages
from skyward.scripts.steps import opening
from skyward.scripts.uv import WHEELS
from skyward.spec.image import Image
from tests.cloudbox import Machine
from tests.environment.packages import install, project
from tests.machines.conftest import IMAGE, Site
from tests.waiting import wait_until

BARE = Image()
NOTE_SYSTEMCTL = "printf '#!/bin/sh\\necho \"$*\" >> /run/systemctl\\n' > /usr/bin/systemctl"
CACHE = "/root/.cache/skyward"


@pytest.fixture(autouse=True)
def _own_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYWARD_DATA_DIR", str(tmp_path / "data"))


class Steps:
    """Notes the steps of each machine; `at` is called with every one."""

    def __init__(self, at: Callable[[str], None] = lambda _: None) -> None:
        self.seen: list[str] = []
        self._at = at

    @property
    def installed(self) -> list[str]:
        """What was made, but for skyward itself: the baked environment may have one of other code."""
        return [step for step in self.seen if step not in ("ssh", "upload", "skyward", "agent")]

    def __call__(self, event: Any) -> None:
        if isinstance(event, sky.BootstrapProgress):
            self.seen.append(event.step)
            self._at(event.step)


def open_pool(
    site: Site, *machines: Machine, image: Image = IMAGE, steps: Any = None, **options: Any
) -> sky.ComputePool:
    return sky.ComputePool(
        site.provider(*machines), nodes=len(machines), image=image, display="quiet", on_event=steps, **options
    )


def fail_to_start(
    site: Site, *machines: Machine, image: Image = IMAGE, steps: Any = None, **options: Any
) -> sky.BootstrapError:
    """Enter a pool that can't start; check that every machine is left clean."""
    pool = open_pool(site, *machines, image=image, steps=steps, **options)
    with pytest.raises(sky.BootstrapError) as caught, pool:
        pass
    error = caught.value
    assert error.step in str(error)
    assert error.machine in str(error)
    assert len(error.last_lines) <= 20
    for machine in machines:
        assert machine.processes() == []
        assert machine.run("ls -d /tmp/skyward-* 2> /dev/null || true") == ""
    return error


@sky.compute
def version_of(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)


@sky.compute
def copies_of_skyward() -> list[str]:
    import importlib.metadata

    return [str(one.locate_file("")) for one in importlib.metadata.distributions(name="skyward")]


@sky.compute
def who() -> tuple[str, str]:
    import getpass
    import sys

    return getpass.getuser(), sys.prefix


@pytest.fixture(scope="module")
def cold(site: Site) -> Iterator[Machine]:
    """A machine that nothing was installed on, for a user who isn't root."""
    (machine,) = site.boot(user="ada")
    yield machine
    machine.destroy()


@pytest.fixture(scope="module")
def warm(site: Site, baked: Path) -> Iterator[Machine]:
    (machine,) = site.boot(baked=baked)
    yield machine
    machine.destroy()


@pytest.fixture
def fresh(site: Site) -> Iterator[Callable[..., Machine]]:
    """Boots a machine that nothing was installed on, for one test."""
    booted: list[Machine] = []

    def boot(**options: Any) -> Machine:
        booted.extend(site.boot(**options))
        return booted[-1]

    yield boot
    for machine in booted:
        machine.destroy()


def test_local_packages_of_here_are_installed_in_their_versions(
    site: Site, warm: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    needs = "Requires-Dist: skyward[digitalocean]\\nRequires-Dist: private @ git+ssh://git@host.invalid/private\\n"
    project(tmp_path / "work" / "editable", "mine", "0.4", needs)
    wheel = pack("tiny-1.5-py3-none-any.whl", {
        "tiny.py": b"", "tiny-1.5.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny\nVersion: 1.5\n",
        "tiny-1.5.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    })  # fmt: skip
    Path(wheel.name).write_bytes(wheel.data)
    install(tmp_path / "more", "private", "2.1", files={"private.py": "", "../bin/private-tool": "#!/bin/sh\n"})
    monkeypatch.syspath_prepend(str(tmp_path / "more"))
    lines = ["-e ./editable", wheel.name, "private @ git+ssh://git@host/private", "pywin32"]
    Path("requirements.txt").write_text("\n".join(lines))

    image = sky.Image.from_here()
    with open_pool(site, warm, image=image) as pool:
        versions = [version_of(name) >> pool for name in ("mine", "tiny", "private")]
        skywards = copies_of_skyward() >> pool
    steps = Steps()
    with open_pool(site, warm, image=image, steps=steps):
        pass

    assert versions == ["0.4", "1.5", "2.1"]
    assert len(skywards) == 1
    assert steps.installed == []
    assert list(image.not_reproduced) == ["pywin32"]


# --- what is installed, and what is skipped -----------------------------------------------------------------


def test_a_cold_machine_is_made_ready_once_for_a_user_without_rights(site: Site, cold: Machine) -> None:
    cold.run("mkdir -p /home/ada/.cache/uv; echo mine | tee /home/ada/notes /home/ada/.cache/uv/mine")
    cold.run("chown -R ada /home/ada; sleep 1000 > /dev/null 2>&1 &")
    first, second = Steps(), Steps()

    with open_pool(site, cold, image=BARE, steps=first) as pool:
        user, prefix = who() >> pool
    with open_pool(site, cold, image=BARE, steps=second) as pool:
        again = who() >> pool

    assert first.seen == ["ssh", "upload", "uv", "python", "packages", "skyward", "agent"]
    assert second.seen == ["ssh", "upload", "agent"]
    assert user == "ada"
    assert again == (user, prefix)
    assert prefix.startswith("/home/ada/.cache/skyward/envs/")
    # All else is as it was.
    assert [p.split() for p in cold.processes()] == [["sleep", "1000"]]
    assert cold.run("ls -A /home/ada /home/ada/.cache /home/ada/.cache/uv /tmp").split() == [
        "/home/ada:", ".cache", ".ssh", "notes", "/home/ada/.cache:", "skyward", "uv", "/home/ada/.cache/uv:", "mine",
        "/tmp:",
    ]  # fmt: skip
    assert cold.run("find / -xdev -newer /home/ada/notes -user ada -not -path '/proc/*' 2> /dev/null || true") == ""


def test_another_image_has_an_environment_of_its_own_and_shares_uv(site: Site, warm: Machine) -> None:
    steps = Steps()
    before = warm.run(f"ls {CACHE}/envs").split()

    with open_pool(site, warm, image=Image(pip=["cowsay"], env={"A": "b"}), steps=steps) as pool:
        version = version_of("cowsay") >> pool

    assert steps.installed == ["python", "packages"]
    assert version
    assert len(warm.run(f"ls {CACHE}/envs").split()) == len(before) + 1
    with pytest.raises(ImportError):
        import cowsay  # noqa: F401


def test_an_environment_that_was_damaged_is_made_again(site: Site, fresh: Callable[..., Machine], baked: Path) -> None:
    machine = fresh(baked=baked)
    machine.run(f"rm {CACHE}/envs/*/bin/python {CACHE}/uv/bin/uv; rm -r {CACHE}/skyward/*")
    steps = Steps()

    with open_pool(site, machine, steps=steps) as pool:
        assert version_of("numpy") >> pool

    assert steps.seen == ["ssh", "upload", "uv", "python", "packages", "skyward", "agent"]


def test_debian_packages_are_installed_once(site: Site, warm: Machine) -> None:
    first, second = Steps(), Steps()
    image = Image(pip=IMAGE.pip, apt=["dns-root-data"])
    warm.run(NOTE_SYSTEMCTL)
    assert not Path("/usr/share/dns/root.hints").exists()

    with open_pool(site, warm, image=image, steps=first) as pool:
        assert "ROOT-SERVERS" in sky.compute(Path.read_text)(Path("/usr/share/dns/root.hints")) >> pool
    with open_pool(site, warm, image=image, steps=second):
        pass

    assert (first.installed, second.installed) == (["apt"], [])
    assert "apt-daily" not in warm.run("cat /run/systemctl 2> /dev/null || true")  # it was there before the pool


@pytest.mark.filterwarnings("ignore:Mismatched versions")  # each pool silences it, for one thread at a time
def test_two_pools_that_start_at_once_share_what_is_made(
    site: Site, fresh: Callable[..., Machine], baked: Path
) -> None:
    machine = fresh(baked=baked)
    steps = [Steps(), Steps()]

    def start(number: int) -> tuple[str, str]:
        with open_pool(site, machine, image=BARE, steps=steps[number]) as pool:
            return who() >> pool

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(start, range(2))

    assert first == second
    assert sorted(s.seen.count("packages") for s in steps) == [0, 1]
    assert sum(s.seen.count("wait") for s in steps) == 1
    assert machine.processes() == []


def kill_script(machine: Machine) -> None:
    machine.run("pkill -KILL -f bootstrap.s[h]; pkill -KILL -x uv; true")


def cut_connection(machine: Machine) -> None:
    machine.run("pkill -KILL -f 'sshd: root@notty'; true")


@pytest.mark.parametrize("fault", [kill_script, cut_connection])
def test_an_interrupted_start_is_repaired_by_the_next(
    fault: Callable[[Machine], None], site: Site, fresh: Callable[..., Machine], baked: Path
) -> None:
    machine = fresh(baked=baked)
    machine.run(f"rm -rf {CACHE}/uv-cache {CACHE}/skyward/*")

    def interrupt(step: str) -> None:
        if step == "packages":
            fault(machine)

    error = fail_to_start(site, machine, image=BARE, steps=Steps(interrupt))
    steps = Steps()
    with open_pool(site, machine, image=BARE, steps=steps) as pool:
        assert version_of("distributed") >> pool == __import__("distributed").__version__

    assert error.step == "packages"
    assert error.status
    assert steps.seen == ["ssh", "upload", "python", "packages", "skyward", "agent"]


@pytest.mark.parametrize("mark", ["", "SKYWARD_POOL=some "], ids=["alone", "in-a-pool"])
def test_an_images_own_script_works_alone_and_ends_the_machine_in_time(
    mark: str, fresh: Callable[..., Machine], baked: Path
) -> None:
    machine = fresh(baked=baked)
    machine.run(f"cat > /root/script.sh <<'END'\n{Image(pip=['cowsay']).bootstrap(ttl=3)}\nEND")
    machine.run(NOTE_SYSTEMCTL)
    wait = "[ $1 != 3 ] || until [ -e /root/over ]; do /bin/sleep 0.05; done; exec /bin/sleep $1"  # time passes later
    machine.run(f"echo '{wait}' > /usr/local/bin/sleep; chmod +x /usr/local/bin/sleep")

    output = machine.run(f"HOME=/root {mark}sh /root/script.sh").splitlines()
    again = machine.run(f"HOME=/root {mark}sh /root/script.sh").splitlines()
    machine.run(f"{output[-1]} -c 'import cowsay'")
    machine.run("! grep -lsaF SKYWARD_POOL= /proc/[0-9]*/environ")  # what ends a pool does not end this
    stopped = machine.run("cat /run/systemctl").splitlines()
    assert stopped == ["--no-block stop apt-daily.timer apt-daily-upgrade.timer"] * 2

    assert [line for line in output if line.startswith("::")] == [
        f"::skyward step {s}" for s in ("python", "packages", "done")
    ]
    assert again == ["::skyward step done", output[-1]]
    machine.run("touch /root/over")
    deadline = time.monotonic() + 60
    while machine.is_running:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("pip", [True, False], ids=["pip", "no-pip"])
def test_uv_is_taken_from_the_index_with_the_hash_that_is_known(pip: bool, fresh: Callable[..., Machine]) -> None:
    machine = fresh()
    if not pip:
        machine.run("rm -rf /usr/lib/python3/dist-packages/pip*")
    text = Image().bootstrap()
    known = WHEELS["x86_64 glibc"][1]
    get = "use_pip_settings; find_uv || step uv get_uv; find_uv; echo $uv; exit\n"

    def run(text: str) -> list[str]:
        definitions = text.rpartition("\n# An incomplete environment")[0]
        (Path(f"/proc/{machine.pid}/root/root/script.sh")).write_text(f"{definitions}\n{get}")
        return machine.run("HOME=/root sh /root/script.sh", check=False).splitlines()

    refused, taken = run(text.replace(known, "0" * 64)), run(text)

    assert "::skyward failed uv 79" in refused
    assert [line for line in refused if known in line]
    assert taken[-1] == f"{CACHE}/uv/bin/uv"


# --- apt at first boot --------------------------------------------------------------------------------------

_REPOSITORY = r"""
mkdir -p /srv/repository /tmp/probe/DEBIAN
printf 'Package: probe\nVersion: 1\nArchitecture: all\nMaintainer: me\nDescription: probe\n' > /tmp/probe/DEBIAN/control
dpkg-deb -b /tmp/probe /srv/repository/probe.deb > /dev/null
cd /srv/repository
{ dpkg-deb -f probe.deb; echo "Filename: ./probe.deb"; echo "Size: $(stat -c %s probe.deb)"
  echo "SHA256: $(sha256sum probe.deb | cut -d' ' -f1)"; } > Packages
rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/* /var/lib/apt/lists/*
echo 'deb [trusted=yes] http://127.0.0.1:8000/ ./' > /etc/apt/sources.list
"""
_SERVER = """
import http.server, pathlib
class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        busy = pathlib.Path("/run/busy")
        if "Packages" in self.path and busy.exists():
            return self.send_error(503)
        super().do_GET()
http.server.HTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
"""
_INSTALL_PROBE = "\n".join(
    [opening("bootstrap.log"), debian_packages(["probe"], asked_by="Image.apt"), "say step done\n"]
)


class Inside:
    """A command on a machine, to which lines are written and whose lines are read."""

    def __init__(self, machine: Machine, *command: str) -> None:
        inside = ["nsenter", "--target", str(machine.pid), "--all", "env", "HOME=/root", *command]
        self._process = subprocess.Popen(inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")

    def end(self) -> list[str]:
        """Close its input, wait until it has ended, and return the lines that were not read."""
        return self._process.communicate(timeout=60)[0].splitlines()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def debian(site: Site) -> Iterator[Machine]:
    """A machine whose only package is in a repository on itself."""
    (machine,) = site.boot()
    machine.run(_REPOSITORY)
    (Path(f"/proc/{machine.pid}/root/srv/server.py")).write_text(_SERVER)
    machine.run("cd /srv/repository && exec python3 /srv/server.py > /dev/null 2>&1 &")
    wait_until(lambda: machine.run("ss -ltn | grep 8000 || true"))
    yield machine
    machine.destroy()


@pytest.fixture
def inside(debian: Machine) -> Iterator[Callable[..., Inside]]:
    """Starts commands on the machine, which has the script that installs its package, and not the package."""
    debian.run("dpkg -P probe > /dev/null 2>&1; rm -rf /root/.cache/skyward /run/busy /run/cloud-init")
    (Path(f"/proc/{debian.pid}/root/root/script.sh")).write_text(_INSTALL_PROBE)
    started: list[Inside] = []

    def start(*command: str) -> Inside:
        started.append(Inside(debian, *command))
        return started[-1]

    yield start
    for command in started:
        command.kill()


@pytest.mark.parametrize("lock", ["lib/apt/lists/lock", "lib/dpkg/lock-frontend", "cache/apt/archives/lock"])
def test_a_start_waits_while_another_one_installs_packages(
    lock: str, debian: Machine, inside: Callable[..., Inside]
) -> None:
    hold = f"import fcntl; f = open('/var/{lock}', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True)"
    other = inside("python3", "-c", f"{hold}; input()")
    assert other.read() == "held"
    script = inside("sh", "/root/script.sh")

    begun = [script.read(), script.read()]
    other.end()

    assert begun == ["::skyward step apt", "::skyward step apt: waiting for another package manager"]
    assert script.end() == ["::skyward step done"]
    assert debian.run("dpkg-query -W probe") == "probe\t1\n"


def test_package_lists_that_are_not_to_be_had_are_asked_for_again(
    debian: Machine, inside: Callable[..., Inside]
) -> None:
    debian.run("touch /run/busy; echo 'Acquire::Retries::Delay \"false\";' > /etc/apt/apt.conf.d/99-no-delay")
    script = inside("sh", "/root/script.sh")

    begun = [script.read(), script.read()]
    debian.run("rm /run/busy")

    assert begun[0] == "::skyward step apt"
    assert begun[1].startswith("::skyward step apt: again in 1 s, Failed to fetch http://127.0.0.1:8000/")
    assert script.end()[-1] == "::skyward step done"


_FAKE_CLOUD_INIT = """
mkdir -p /run/cloud-init; touch /run/cloud-init/status.json
printf '#!/bin/sh\ntest "$*" = "status --wait" && until [ -e /run/cloud-init/result.json ]; do sleep 0.1; done\n' \
    > /usr/bin/cloud-init
chmod 755 /usr/bin/cloud-init
"""


def test_packages_wait_until_cloud_init_has_ended(debian: Machine, inside: Callable[..., Inside]) -> None:
    debian.run(_FAKE_CLOUD_INIT)
    script = inside("sh", "/root/script.sh")

    begun = [script.read(), script.read()]
    debian.run("touch /run/cloud-init/result.json")

    assert begun == ["::skyward step apt", "::skyward step apt: waiting for cloud-init"]
    assert script.end() == ["::skyward step done"]


def test_a_script_that_cloud_init_runs_does_not_wait_for_it(debian: Machine, inside: Callable[..., Inside]) -> None:
    debian.run(_FAKE_CLOUD_INIT)

    script = inside("sh", "-c", "sh /root/script.sh; exit $?", "/usr/bin/cloud-init", "modules")

    assert script.end() == ["::skyward step apt", "::skyward step done"]


# --- what is said when it can't be --------------------------------------------------------------------------


def test_a_package_that_does_not_exist_is_named(site: Site, warm: Machine) -> None:
    error = fail_to_start(site, warm, image=Image(pip=["skyward-no-such-package"]))

    assert (error.step, error.status, error.machine) == ("packages", 1, f"root@{warm.address}")
    assert "skyward-no-such-package was not found" in "\n".join(error.last_lines)
    assert "Check the names and versions in Image(pip=...)." in str(error)


def test_the_log_of_a_machine_that_failed_is_kept_here(site: Site, warm: Machine) -> None:
    heard: list[sky.SkywardEvent] = []

    error = fail_to_start(site, warm, image=Image(pip=["skyward-no-such-package"]), steps=heard.append)

    assert error.log is not None
    assert error.log in str(error)
    path = Path(error.log)
    assert path.parent.parent == Path(os.environ["SKYWARD_DATA_DIR"]) / "logs"
    assert path.name == f"root@{warm.address}.log"
    text = path.read_text()
    assert "step packages" in text  # what was heard
    assert "/logs/bootstrap.log" in text  # and the machine's own log
    assert "skyward-no-such-package was not found" in text.partition("/logs/bootstrap.log")[2]
    names = [type(event).__name__ for event in heard]
    assert names[-3:] == ["Error", "PoolStopping", "InstanceStopping"]
    assert names.count("BootstrapCompleted") == 0
    assert sky.Error(message=str(error), instance_id=f"root@{warm.address}") in heard


def test_of_a_machine_that_does_not_answer_what_was_heard_is_kept(
    site: Site, fresh: Callable[..., Machine], baked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = fresh(baked=baked)
    monkeypatch.setattr(remote, "_LOG_S", 0.5)

    def cut(step: str) -> None:
        if step == "packages":
            machine.destroy()

    with pytest.raises(sky.BootstrapError) as caught, open_pool(site, machine, image=BARE, steps=Steps(cut)):
        pass

    assert caught.value.log is not None
    text = Path(caught.value.log).read_text()
    assert "step packages" in text
    assert "bootstrap.log" not in text


def test_a_debian_package_that_does_not_exist_is_named(site: Site, warm: Machine) -> None:
    error = fail_to_start(site, warm, image=Image(pip=IMAGE.pip, apt=["skyward-no-such-package"]))

    assert (error.step, error.status) == ("apt", 100)
    assert "Unable to locate package skyward-no-such-package" in "\n".join(error.last_lines)


def test_debian_packages_need_rights(site: Site, cold: Machine) -> None:
    cold.run("pkill sleep; true")

    error = fail_to_start(site, cold, image=Image(apt=["hello"]))

    assert (error.step, error.status) == ("apt", 77)
    assert error.last_lines == ("this needs root: user ada is not root and has no sudo without a password",)


def test_a_python_that_is_not_to_be_had_is_named(site: Site, warm: Machine) -> None:
    warm.run("mkdir -p /etc/uv; echo 'python-downloads = \"never\"' > /etc/uv/uv.toml")

    error = fail_to_start(site, warm, image=Image(python="3.9"))

    assert (error.step, error.status) == ("python", 80)
    assert "Python 3.9 is not on this machine, which has Python 3.11" in error.last_lines[-1]
    assert "Image(python=...)" in error.last_lines[-1]


def test_a_machine_with_an_old_python_and_no_way_to_a_new_one_is_told_so(
    site: Site, fresh: Callable[..., Machine]
) -> None:
    machine = fresh()
    machine.run("rm -f /usr/bin/python3* /usr/bin/curl /usr/bin/wget")
    machine.run("printf '#!/bin/sh\\necho Python 3.6.9; exit 1\\n' > /usr/bin/python3; chmod +x /usr/bin/python3")

    error = fail_to_start(site, machine)

    assert (error.step, error.status) == ("uv", 79)
    assert "install it on this machine" in error.last_lines[-1]


def test_an_agent_that_dies_at_birth_is_told_at_once_with_its_last_words(
    site: Site, fresh: Callable[..., Machine], baked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = fresh(baked=baked)
    died = "import os, sys; '--serve' in sys.orig_argv and (print('no luck', file=sys.stderr, flush=True), os._exit(3))"
    machine.run(f"cd {CACHE}/envs/*/lib/python3*/site-packages && echo {shlex.quote(died)} > died.pth")
    alive: list[bool] = []
    is_alive = Bootstrap._is_alive

    async def note(*arguments: Any) -> bool:
        alive.append(await is_alive(*arguments))
        return alive[-1]

    monkeypatch.setattr(Bootstrap, "_is_alive", note)

    error = fail_to_start(site, machine)

    assert (error.step, error.last_lines) == ("agent", ("no luck",))
    assert alive.count(True) < 50  # or it was waited for in vain


@pytest.fixture(scope="module")
def odd(site: Site, baked: Path) -> Iterator[Machine]:
    """A machine for tests that break something on it and repair it."""
    (machine,) = site.boot(baked=baked)
    yield machine
    machine.destroy()


_LATE = 'exec /bin/date -d "3 days ago" "$@"'


@pytest.mark.parametrize(
    ("breaks", "repairs", "told"),
    [
        ("mv /usr/bin/awk /usr/bin/tr /root", "mv /root/awk /root/tr /usr/bin", "it lacks awk, tr, which"),
        ("mount -t tmpfs -o nr_inodes=1 tmpfs /tmp", "umount /tmp", "`df -i /tmp`"),
        (
            f"echo '{_LATE}' > /usr/local/bin/date; chmod +x /usr/local/bin/date",
            "rm /usr/local/bin/date",
            "its clock is 72.0 hours behind the clock of this computer",
        ),
    ],
    ids=["programs", "inodes", "clock"],
)
def test_what_a_machine_lacks_for_every_pool_is_told_first(
    breaks: str, repairs: str, told: str, site: Site, odd: Machine
) -> None:
    steps = Steps()
    odd.run(breaks)
    try:
        error = fail_to_start(site, odd, steps=steps)
    finally:
        odd.run(repairs)

    assert steps.seen == ["ssh", "upload"]
    assert told in "\n".join(error.last_lines)


def test_a_machine_without_setsid_and_pgrep_will_do(site: Site, fresh: Callable[..., Machine], baked: Path) -> None:
    machine = fresh(baked=baked)
    machine.run("rm /usr/bin/setsid /usr/bin/pgrep")

    with open_pool(site, machine) as pool:
        assert version_of("numpy") >> pool

    assert machine.processes() == []
    assert machine.run("ls -d /tmp/skyward-* 2> /dev/null || true") == ""


_NO_LUCK = """
import os, sys

if "--serve" in sys.orig_argv:
    import distributed

    async def start(nanny):
        print("no luck", file=sys.stderr, flush=True)
        os._exit(3)

    distributed.Nanny.start_unsafe = start
"""


def test_an_agent_that_dies_while_workers_start_is_told_with_its_log(site: Site, odd: Machine) -> None:
    packages = f"{CACHE}/envs/*/lib/python3*/site-packages"
    odd.run(f"cd {packages} && echo {shlex.quote(_NO_LUCK)} > no_luck.py && echo import no_luck > no_luck.pth")
    try:
        with pytest.raises(sky.PoolError) as caught, open_pool(site, odd):
            pass
    finally:
        odd.run(f"cd {packages} && rm no_luck.py no_luck.pth")

    # It may die before or after the first connection to it.
    (log,) = re.findall(r"[Ii]ts log is ([^\s;)]+)", str(caught.value))
    assert "no luck" in Path(log).read_text()
    assert odd.processes() == []


def test_a_home_where_no_program_may_run_is_named(site: Site, odd: Machine) -> None:
    odd.run(f"mount -t tmpfs -o noexec tmpfs {CACHE}")
    try:
        error = fail_to_start(site, odd)
    finally:
        odd.run(f"umount {CACHE}")

    assert (error.step, error.status) == ("home", 83)
    assert f"programs can't be run in {CACHE}: its file system is mounted noexec" in error.last_lines[-1]


def test_a_proxy_that_is_not_there_is_named(site: Site, odd: Machine) -> None:
    odd.run(f"echo 'export https_proxy=http://me:secret@{odd.address}:9' > /root/.bashrc")
    try:
        error = fail_to_start(site, odd, image=Image(pip=["cowsay"]))
    finally:
        odd.run("rm /root/.bashrc")

    assert (error.step, error.status) == ("index", 89)
    assert f"the package index https://pypi.org is not reached through the proxy http://{odd.address}:9: " in str(error)
    assert "secret" not in str(error)


def test_variables_and_modules_of_the_user_do_not_steer_installers(
    site: Site, fresh: Callable[..., Machine], baked: Path
) -> None:
    machine = fresh(baked=baked)
    names = "PYTHONHOME PYTHONPATH PYTHONSTARTUP PIP_TARGET PIP_PREFIX UV_PYTHON UV_TARGET VIRTUAL_ENV CONDA_PREFIX"
    machine.run(f"for name in {names}; do echo export $name=/nowhere; done > /root/.bashrc")
    user_site = "/root/.local/lib/python3.11/site-packages"
    machine.run(f"mkdir -p {user_site}; cd {user_site}; echo 'print(1)' > usercustomize.py")
    machine.run(f"rm -r {CACHE}/uv")
    steps = Steps()

    with open_pool(site, machine, image=BARE, steps=steps) as pool:
        found = sky.compute(lambda: [name for name in os.environ if "nowhere" in os.environ[name]])() >> pool

    assert steps.installed == ["uv", "python", "packages"]
    assert found == []


def test_a_sitecustomize_that_prints_is_named(site: Site, odd: Machine) -> None:
    odd.run("cd /etc/python3.11 && cp sitecustomize.py /root/plain.py && echo 'print(\"Hello\")' >> sitecustomize.py")
    try:
        error = fail_to_start(site, odd, image=Image(pip=["cowsay"]))
    finally:
        odd.run("cp /root/plain.py /etc/python3.11/sitecustomize.py")

    assert (error.step, error.status) == ("python", 84)
    assert "prints 'Hello' when it starts" in error.last_lines[-1]


def test_a_full_disk_is_named(site: Site, fresh: Callable[..., Machine]) -> None:
    error = fail_to_start(site, fresh(disk="64m"))

    assert error.step == "packages"
    assert error.status
    assert [line for line in error.last_lines if "No space left" in line or "is full" in line]


def test_the_others_stop_their_work_when_one_machine_fails(site: Site, fresh: Callable[..., Machine]) -> None:
    good, bad = fresh(), fresh()
    bad.run("printf '#!/bin/sh\\nsleep 1000\\n' > /usr/bin/uv; chmod +x /usr/bin/uv")  # never gets further

    def fail_when_the_other_is_at_work(event: Any) -> None:
        if isinstance(event, sky.BootstrapProgress) and event.step == "packages":
            bad.run("pkill -KILL -f bootstrap.s[h]")

    error = fail_to_start(site, good, bad, image=BARE, steps=fail_when_the_other_is_at_work)

    assert (error.machine, error.status) == (f"root@{bad.address}", 128 + 9)
    assert good.run(f"ls {CACHE}/envs/*/complete 2> /dev/null || true") == ""
