"""Root drops its rights: its commands act as the owner of the folder they work in.

The tests pass for any user. Only root changes its user in them; every other user stays itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import pwd
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator  # noqa: TC003  beside the annotations that pytest may resolve
from pathlib import Path
from types import SimpleNamespace

import pytest

import freegpt_auth
from freegpt_auth import cli
from freegpt_auth.acting import as_owner_of, thread_as_owner_of
from freegpt_auth.exceptions import StoreError
from freegpt_auth.stores.file.usage import UsageDatabase
from freegpt_auth.usage.base import Batch
from freegpt_auth.usage.recorder import UsageRecorder

IS_ROOT = os.geteuid() == 0
OWNER = 1 if IS_ROOT else os.geteuid()
UNNAMED = 54321 if IS_ROOT else os.geteuid()
"""A user without an entry in the password database."""


@pytest.fixture
def roots() -> Iterator[Path]:
    """Return a folder of this user that all may enter."""
    with tempfile.TemporaryDirectory() as folder:
        yield made(Path(folder))


@pytest.fixture
def home() -> Iterator[Path]:
    """Return a folder of another user, if this one is root, that all may enter."""
    with tempfile.TemporaryDirectory() as folder:
        yield owned(made(Path(folder)))


def identity() -> tuple[int, int, list[int]]:
    """Return the effective user and groups of this process."""
    return os.geteuid(), os.getegid(), os.getgroups()


def owned(path: Path) -> Path:
    """Give a file or link to the other user."""
    os.chown(path, OWNER, OWNER if IS_ROOT else -1, follow_symlinks=False)
    return path


def made(path: Path, mode: int = 0o755) -> Path:
    """Make a folder, unless it is there, and set its mode."""
    path.mkdir(exist_ok=True)
    path.chmod(mode)
    return path


def linked(path: Path, target: Path | str) -> Path:
    """Make a symbolic link."""
    path.symlink_to(target)
    return path


def with_file(folder: Path) -> Path:
    """Return a token file of the other user in a folder."""
    (folder / "t.json").touch()
    return owned(folder / "t.json")


def use(home: Path) -> UsageRecorder:
    """Record one use and write it, as a server does."""
    recorder = UsageRecorder(UsageDatabase(str(home / "t.usage.db")), interval=60)
    recorder.record(("id", 1.0))
    recorder.flush()
    return recorder


def count(database: Path, token_id: str = "id") -> None:
    """Write one use as a command does."""
    UsageDatabase(str(database)).write(Batch("p", 1, {token_id: (1, 1.0)}), 5.0)


PLACES: dict[str, Callable[[Path, Path], Path]] = {
    "folder": lambda home, _: home / "t.json",
    "missing folder": lambda home, _: home / "missing" / "t.json",
    "root's folder below": lambda home, _: made(home / "roots") / "t.json",
    "link to root's folder": lambda home, roots: linked(home / "t.json", roots / "t.json"),
    "link through a folder": lambda home, roots: linked(home / "link", roots) / "t.json",
    "root's link": lambda home, roots: linked(roots / "t.json", home / "t.json"),
    "relative link": lambda home, roots: linked(roots / "t.json", f"./../{home.name}/t.json"),
    "user's link": lambda _, roots: owned(linked(roots / "t.json", roots / "other.json")),
    "shared folder": lambda _, roots: with_file(made(roots, 0o777)),
    "shared folder as /tmp": lambda _, roots: with_file(made(roots, 0o1777)),
    "folder in a shared one": lambda _, roots: with_file(made(made(roots, 0o777) / "below")),
}


@pytest.mark.parametrize("kind", PLACES)
def test_root_acts_as_owner(home: Path, roots: Path, kind: str) -> None:
    """A command has the rights of the user that decides which file a name means."""
    place, before = PLACES[kind](home, roots), identity()
    with as_owner_of(str(place)):
        assert os.geteuid() == OWNER
        groups = os.getgrouplist(pwd.getpwuid(OWNER).pw_name, os.getegid()) if IS_ROOT else os.getgroups()
        assert os.getgroups() == groups
    assert identity() == before


STAYS: dict[str, Callable[[Path], Path]] = {
    "folder": lambda roots: roots / "t.json",
    "file of another": with_file,
    "link": lambda roots: linked(roots / "link.json", roots / "t.json"),
    "link to itself": lambda roots: linked(roots / "link.json", roots / "link.json"),
    "shared with root's group": lambda roots: made(roots, 0o775) / "t.json",
}


@pytest.mark.parametrize("kind", STAYS)
def test_root_stays_root_in_its_own_folder(roots: Path, kind: str) -> None:
    """In a folder that only root may write no file can be planted, and the file may belong to the server's user."""
    before = identity()
    with as_owner_of(str(STAYS[kind](roots))):
        assert identity() == before


def test_other_users_stay_themselves(home: Path, unprivileged: Path) -> None:
    """A user other than root stays itself, in any folder."""
    before = identity()
    for folder in (unprivileged, home):
        with as_owner_of(str(folder / "t.json")), thread_as_owner_of(str(folder / "t.json")):
            assert identity() == before


@pytest.mark.parametrize("below", ["", "folder"])
def test_root_refuses_a_shared_folder(roots: Path, capsys: pytest.CaptureFixture[str], below: str) -> None:
    """If any user may plant a file, and no file names the server's user, root does nothing and reports it."""
    path = made(roots / below) / "t.json"
    made(roots, 0o777)
    status = cli.main(["--store", str(path), "create", "ci"])
    refused = f"others may write {roots}, so root does not work there; use a folder that only one user may write, or"
    assert (status, refused in capsys.readouterr().err, path.exists()) == (int(IS_ROOT), IS_ROOT, not IS_ROOT)


@pytest.mark.parametrize(("of_file", "of_folder", "group"), [(100, 0, 100), (0, 200, 200), (0, 0, UNNAMED)])
def test_user_without_name_has_the_group_of_its_files(roots: Path, of_file: int, of_folder: int, group: int) -> None:
    """In a container a user without a name has the group of the file, else of the folder, and not root's."""
    for each, number in ((with_file(roots), of_file), (roots, of_folder)):
        os.chown(each, UNNAMED, number if IS_ROOT else -1)
    with as_owner_of(str(roots / "t.json")):
        assert (os.geteuid(), os.getegid()) == (UNNAMED, group if IS_ROOT else os.getegid())
        assert IS_ROOT is (os.getgroups() == [group])


def test_blocks_are_nested(home: Path, roots: Path) -> None:
    """Each end of a copy has its own owner; a database is accessed as root, the owner of the password file."""
    before = identity()
    with as_owner_of(str(home / "t.json")):
        for location in (str(roots / "t.json"), "postgresql://db/tokens"):
            with as_owner_of(location):
                assert os.geteuid() == before[0]
            assert os.geteuid() == OWNER
    assert identity() == before


def test_root_without_capabilities_fails_in_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If root of a container may not become another user, the command names the user to run it as."""
    own_group, setegid = os.getegid(), os.setegid

    def refuse(group: int) -> None:
        if group != own_group:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        setegid(group)

    monkeypatch.setattr(os, "setegid", refuse)
    status = cli.main(["--store", str(home / "t.json"), "list"])
    advice = f"its folder belongs to user {OWNER}, and this process may not act as that user"
    assert (status, advice in capsys.readouterr().err) == (int(IS_ROOT), IS_ROOT)


def test_server_writes_usage_as_owner(home: Path) -> None:
    """The usage database of a server of root belongs to the owner of its folder; no other thread changes its user."""
    use(home).after_fork_in_child()
    group = pwd.getpwuid(OWNER).pw_gid if IS_ROOT else os.getegid()
    assert {(each.stat().st_uid, each.stat().st_gid) for each in home.iterdir()} == {(OWNER, group)}
    (home / "after").touch()
    assert (home / "after").stat().st_uid == os.geteuid()


@pytest.mark.parametrize(
    "libc", [SimpleNamespace(), SimpleNamespace(setfsuid=lambda _: 0, setfsgid=lambda _: 0)], ids=["other", "forbidden"]
)
def test_server_that_cannot_change_its_user(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, libc: SimpleNamespace
) -> None:
    """Without setfsuid(2), or if it is forbidden, a server of root keeps the uses in memory and logs the reason."""
    monkeypatch.setattr(ctypes, "CDLL", lambda _: libc)
    recorder = use(home)
    refused = f"its folder belongs to user {OWNER}; run the server as that user. It is kept in memory"
    assert ((home / "t.usage.db").exists(), refused in caplog.text) == (not IS_ROOT, IS_ROOT)
    recorder.after_fork_in_child()


def test_unreadable_link_is_reported(roots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root does not follow a link that it cannot read."""

    def fail(_: Path) -> Path:
        raise OSError(errno.EIO, "Input/output error")

    link = linked(roots / "t.json", "other.json")
    monkeypatch.setattr(Path, "readlink", fail)
    with pytest.raises(StoreError, match="the way to it cannot be followed") if IS_ROOT else contextlib.nullcontext():
        as_owner_of(str(link)).__enter__()


# --- attacks on root


def created(store: Path) -> str:
    """Create a token and return its id."""
    assert cli.main(["--store", str(store), "create", "ci"]) == 0
    return next(iter(freegpt_auth.FileTokenStore(store).tokens().values())).id


def test_files_of_root_belong_to_the_server(home: Path, roots: Path) -> None:
    """After ``docker exec`` or ``sudo`` the token file, its lock and the usage belong to the server's user.

    A copy into a folder of root belongs to root.
    """
    count(home / "old.usage.db", created(home / "old.json"))
    for each in home.iterdir():
        owned(each)
    assert cli.main(["copy", str(home / "old.json"), str(home / "new.json")]) == 0
    assert {each.stat().st_uid for each in home.iterdir()} == {OWNER}
    assert {each.name for each in home.iterdir()} >= {"new.json", "new.json.lock", "new.usage.db", "new.usage.db.lock"}
    assert cli.main(["copy", str(home / "old.json"), str(roots / "new.json")]) == 0
    assert {each.stat().st_uid for each in roots.iterdir()} == {os.geteuid()}


def test_usage_that_root_may_not_copy(home: Path, roots: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If root must not write the usage, the tokens are copied and the error says that only their usage is missing."""
    origin, target = home / "t.json", roots / "new.json"
    count(home / "t.usage.db", created(origin))
    shutil.copy(origin, target)
    for each in (*home.iterdir(), target):
        owned(each)
    made(roots, 0o1777)
    assert cli.main(["copy", str(origin), str(target)]) == int(IS_ROOT)
    error = f"the tokens were copied; their usage could not be copied: {roots}/new.usage.db: others may write"
    assert (error in capsys.readouterr().err) is IS_ROOT


def test_lock_replaced_by_a_file_of_root(home: Path, roots: Path) -> None:
    """A hard link to a file of root, in place of the lock, gives the user no right to that file."""
    secret = roots / "secret"
    secret.write_bytes(b"of root")
    secret.chmod(0o600)
    os.link(secret, home / "t.json.lock")
    before = secret.stat()
    assert cli.main(["--store", str(home / "t.json"), "create", "ci"]) == int(IS_ROOT)
    assert secret.stat()[:6] == before[:6]  # mode, inode, device, links, user and group
    assert secret.read_bytes() == b"of root"


@pytest.mark.parametrize("is_server", [False, True])
def test_planted_journal_deletes_no_file(home: Path, roots: Path, *, is_server: bool) -> None:
    """SQLite deletes the file that a journal names, with the rights of the process that opens the database."""
    victim = made(roots / "folder") / "victim"
    victim.write_bytes(b"of root")
    made(victim.parent, 0o555)
    count(home / "t.usage.db")
    name = str(victim).encode()
    record = struct.pack(">I", 1) + name + struct.pack(">II", len(name), sum(name)) + bytes.fromhex("d9d505f920a163d7")
    (home / "t.usage.db-journal").write_bytes(b"x" * 512 + record)
    for each in home.iterdir():
        owned(each)
    if is_server:
        use(home).after_fork_in_child()
    else:
        assert cli.main(["--store", str(home / "t.json"), "list"]) == 0
    assert victim.exists()


# Exits with 70 at an import as another user: the audit event precedes the search for a module that is not loaded.
PROGRAM = """
import os, sys
import freegpt_auth.cli as cli
user = os.geteuid()
sys.addaudithook(lambda event, _: event == "import" and os.geteuid() != user and os._exit(70))
assert "lib" in cli.__file__
sys.exit(cli.main())
"""


def test_modules_are_imported_as_root(home: Path, tmp_path: Path) -> None:
    """Every module is imported before the change of user: the owner of the folder may have no access to it."""
    package = Path(freegpt_auth.__file__).parent
    shutil.copytree(package, tmp_path / "lib" / package.name, ignore=shutil.ignore_patterns("__pycache__"))

    def done(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"PYTHONPATH": str(tmp_path / "lib")}  # without coverage's variables: it would count the copy
        command = [sys.executable, "-c", PROGRAM, *arguments]
        return subprocess.run(command, cwd=home, env=environment, check=False, capture_output=True, text=True)

    made(home, 0o1755)  # filelock checks more in a sticky folder
    assert done("--store=t.json", "create", "ci").returncode == 0
    (home / "t.json").write_text((home / "t.json").read_text().replace('"ci"', r'"\u202e"'))  # to be escaped
    for line in ("--store=t.json list", "copy t.json new.json", "--store=new.json delete \u202e"):
        assert (done(*line.split()).returncode, {each.stat().st_uid for each in home.iterdir()}) == (0, {OWNER})
    # The advice to install the driver would be wrong.
    assert "does not answer" in done("copy", "postgresql://127.0.0.1:1/tokens", "new.json").stderr
