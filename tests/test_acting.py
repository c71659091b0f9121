"""Root lends its rights to nobody: its commands act as the owner of the folder they work in.

The tests hold for any user, who stays itself; for root they show the change of user.
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
from freegpt_auth import acting, cli
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
def home() -> Iterator[Path]:
    """Return a folder of another user, if root makes it; all may enter."""
    with tempfile.TemporaryDirectory() as folder:
        own(Path(folder))
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def roots() -> Iterator[Path]:
    """Return a folder of this user that all may enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def own(path: Path, user: int = OWNER) -> None:
    """Give a file to the other user."""
    os.chown(path, user, user if IS_ROOT else -1, follow_symlinks=False)


def made(path: Path) -> Path:
    """Make a folder."""
    path.mkdir()
    return path


def linked(path: Path, target: Path | str) -> Path:
    """Make a symbolic link."""
    path.symlink_to(target)
    return path


def in_shared(folder: Path, mode: int) -> Path:
    """Return a token file of the other user in a folder that all may write."""
    folder.chmod(mode)
    (folder / "t.json").touch()
    own(folder / "t.json")
    return folder / "t.json"


def of_the_user(link: Path) -> Path:
    """Give a link to the other user."""
    own(link)
    return link


PLACES: dict[str, Callable[[Path, Path], Path]] = {
    "folder": lambda home, _: home / "t.json",
    "missing folder": lambda home, _: home / "missing" / "t.json",
    "root's folder below": lambda home, _: made(home / "roots") / "t.json",
    "link to root's folder": lambda home, roots: linked(home / "t.json", roots / "t.json"),
    "link through a folder": lambda home, roots: linked(home / "link", roots) / "t.json",
    "root's link": lambda home, roots: linked(roots / "t.json", home / "t.json"),
    "relative link": lambda home, roots: linked(roots / "t.json", f"./../{home.name}/t.json"),
    "user's link": lambda _, roots: of_the_user(linked(roots / "t.json", roots / "other.json")),
    "shared folder": lambda _, roots: in_shared(roots, 0o777),
    "shared folder as /tmp": lambda _, roots: in_shared(roots, 0o1777),
    "folder in a shared one": lambda _, roots: (in_shared(made(roots / "below"), 0o755), roots.chmod(0o777))[0],
}


@pytest.mark.parametrize("kind", PLACES)
def test_root_acts_as_owner(home: Path, roots: Path, kind: str) -> None:
    """The user that decides which file a name means is the one whose rights the command has."""
    place, before = PLACES[kind](home, roots), acting._current()
    with as_owner_of(str(place)):
        assert os.geteuid() == OWNER
        assert os.getgroups() == (
            os.getgrouplist(pwd.getpwuid(OWNER).pw_name, os.getegid()) if IS_ROOT else os.getgroups()
        )
    assert acting._current() == before


STAYS: dict[str, Callable[[Path], Path]] = {
    "folder": lambda roots: roots / "t.json",
    "file of another": lambda roots: in_shared(roots, 0o755),
    "link": lambda roots: linked(roots / "link.json", roots / "t.json"),
    "link to itself": lambda roots: linked(roots / "link.json", roots / "link.json"),
    "shared with root's group": lambda roots: (roots.chmod(0o775), roots / "t.json")[1],
}


@pytest.mark.parametrize("kind", STAYS)
def test_root_stays_root_in_its_own_folder(roots: Path, kind: str) -> None:
    """Where only root may write nobody can plant anything, and the file may belong to the user of the server."""
    before = acting._current()
    with as_owner_of(str(STAYS[kind](roots))):
        assert acting._current() == before


def test_other_users_stay_themselves(home: Path, unprivileged: Path) -> None:
    """A user who is not root has nothing to lend, in any folder."""
    before = acting._current()
    for folder in (unprivileged, home):
        with as_owner_of(str(folder / "t.json")), thread_as_owner_of(str(folder / "t.json")):
            assert acting._current() == before


@pytest.mark.parametrize("below", ["", "folder"])
def test_root_refuses_a_shared_folder(roots: Path, capsys: pytest.CaptureFixture[str], below: str) -> None:
    """Where any user may plant a file, and no file names the user of the server, root does nothing and says so."""
    (roots / below).mkdir(exist_ok=True)
    roots.chmod(0o777)
    status = cli.main(["--store", str(roots / below / "t.json"), "create", "ci"])
    refused = f"others may write {roots}, so root does not work there; use a folder that only one user may write, or"
    assert (status, refused in capsys.readouterr().err) == (int(IS_ROOT), IS_ROOT)
    assert (roots / below / "t.json").exists() is not IS_ROOT


@pytest.mark.parametrize(("file_group", "folder_group", "group"), [(100, 0, 100), (0, 200, 200), (0, 0, UNNAMED)])
def test_user_without_name_has_the_group_of_its_files(
    roots: Path, file_group: int, folder_group: int, group: int
) -> None:
    """In a container users often have no name: their group is the file's, else the folder's, and never root's."""
    path = roots / "t.json"
    path.touch()
    for each, number in ((path, file_group), (roots, folder_group)):
        os.chown(each, UNNAMED, number if IS_ROOT else -1)
    with as_owner_of(str(path)):
        assert (os.geteuid(), os.getegid()) == (UNNAMED, group if IS_ROOT else os.getegid())
        assert IS_ROOT is (os.getgroups() == [group])


def test_blocks_are_nested(home: Path, roots: Path) -> None:
    """Each end of a copy has its own owner, and a database is root's, who has the password file."""
    before = acting._current()
    with as_owner_of(str(home / "t.json")):
        for location, user in ((str(roots / "t.json"), before.user), ("postgresql://db/tokens", before.user)):
            with as_owner_of(location):
                assert os.geteuid() == user
            assert os.geteuid() == OWNER
    assert acting._current() == before


def test_root_without_capabilities_fails_in_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root of a container may not be allowed to become another user: the command says which user to run it as."""
    own_group, setegid = os.getegid(), os.setegid

    def refuse(group: int) -> None:
        if group != own_group:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        setegid(group)

    monkeypatch.setattr(os, "setegid", refuse)
    status = cli.main(["--store", str(home / "t.json"), "list"])
    advice = f"its folder belongs to user {OWNER}, and this process may not act as that user"
    assert (status, advice in capsys.readouterr().err) == (int(IS_ROOT), IS_ROOT)


def _record(home: Path) -> None:
    """Write usage as a server does."""
    recorder = UsageRecorder(UsageDatabase(str(home / "t.usage.db")), interval=60)
    recorder.record(("id", 1.0))
    recorder.flush()
    recorder.after_fork_in_child()


def test_server_writes_usage_as_owner(home: Path) -> None:
    """The usage database of a server that runs as root belongs to the owner of its folder, and no other thread changes."""
    _record(home)
    assert {each.stat().st_uid for each in home.iterdir()} == {OWNER}
    (home / "after").touch()
    assert (home / "after").stat().st_uid == os.geteuid()


@pytest.mark.parametrize(
    "libc", [SimpleNamespace(), SimpleNamespace(setfsuid=lambda _: 0, setfsgid=lambda _: 0)], ids=["other", "forbidden"]
)
def test_server_that_may_not_change_its_user_writes_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, libc: SimpleNamespace
) -> None:
    """Elsewhere than on Linux, or where it is forbidden, a server of root keeps the uses in memory and says why."""
    monkeypatch.setattr(ctypes, "CDLL", lambda _: libc)
    recorder = UsageRecorder(UsageDatabase(str(home / "t.usage.db")), interval=60)
    recorder.record(("id", 1.0))
    recorder.flush()
    assert (home / "t.usage.db").exists() is not IS_ROOT
    refused = f"its folder belongs to user {OWNER}; run the server as that user. It is kept in memory"
    assert (refused in caplog.text) is IS_ROOT
    recorder.after_fork_in_child()


def test_way_that_cannot_be_followed_is_reported(roots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root does not guess who may have made a link that it cannot read."""

    def fail(_: Path) -> Path:
        raise OSError(errno.EIO, "Input/output error")

    link = linked(roots / "t.json", "other.json")
    monkeypatch.setattr(Path, "readlink", fail)
    with pytest.raises(StoreError, match="the way to it cannot be followed") if IS_ROOT else contextlib.nullcontext():
        as_owner_of(str(link)).__enter__()


# --- the attacks


def test_first_token_by_root_is_readable_by_the_server(home: Path) -> None:
    """After ``docker exec`` or ``sudo`` the token file, its lock and the usage belong to the user of the server."""
    usage = UsageDatabase(str(home / "old.usage.db"))
    assert cli.main(["--store", str(home / "old.json"), "create", "ci"]) == 0
    token_id = next(iter(freegpt_auth.FileTokenStore(home / "old.json").tokens().values())).id
    usage.add(Batch("p", 1, {token_id: (1, 1.0)}), 5.0)
    for each in home.iterdir():
        own(each)
    assert cli.main(["copy", str(home / "old.json"), str(home / "new.json")]) == 0
    assert {each.stat().st_uid for each in home.iterdir()} == {OWNER}
    assert {each.name for each in home.iterdir()} >= {"new.json", "new.json.lock", "new.usage.db", "new.usage.db.lock"}


def test_copied_tokens_without_their_usage(home: Path, roots: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where root must not write usage, the tokens are copied, and the error says so."""
    origin, target = home / "t.json", roots / "new.json"
    assert cli.main(["--store", str(origin), "create", "ci"]) == 0
    shutil.copy(origin, target)
    token_id = next(iter(freegpt_auth.FileTokenStore(origin).tokens().values())).id
    UsageDatabase(str(home / "t.usage.db")).add(Batch("p", 1, {token_id: (1, 1.0)}), 5.0)
    for each in (*home.iterdir(), target):
        own(each)
    roots.chmod(0o1777)
    capsys.readouterr()
    assert cli.main(["copy", str(origin), str(target)]) == int(IS_ROOT)
    error = f"the tokens were copied; their usage could not be copied: {roots}/new.usage.db: others may write"
    assert (error in capsys.readouterr().err) is IS_ROOT


def test_lock_replaced_by_a_file_of_root(home: Path, roots: Path) -> None:
    """A user who links a file of root in the place of the lock gets no right to it."""
    secret = roots / "secret"
    secret.write_bytes(b"of root")
    secret.chmod(0o600)
    os.link(secret, home / "t.json.lock")
    before = secret.stat()
    assert cli.main(["--store", str(home / "t.json"), "create", "ci"]) == int(IS_ROOT)
    after = secret.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert secret.read_bytes() == b"of root"


def _list(home: Path) -> None:
    """Show the tokens, with their usage."""
    assert cli.main(["--store", str(home / "t.json"), "list"]) == 0


@pytest.mark.parametrize("work", [_list, _record], ids=["command", "server"])
def test_planted_journal_deletes_no_file(home: Path, roots: Path, work: Callable[[Path], None]) -> None:
    """SQLite deletes the file that a journal names, with the rights of the process that opens the database."""
    victim = made(roots / "folder") / "victim"
    victim.write_bytes(b"of root")
    victim.parent.chmod(0o555)
    database = home / "t.usage.db"
    UsageDatabase(str(database)).add(Batch("p", 1, {"id": (1, 1.0)}), 5.0)
    own(database)
    own(home / "t.usage.db.lock")
    name = str(victim).encode()
    record = struct.pack(">I", 1) + name + struct.pack(">II", len(name), sum(name)) + bytes.fromhex("d9d505f920a163d7")
    (home / "t.usage.db-journal").write_bytes(b"x" * 512 + record)
    own(home / "t.usage.db-journal")
    work(home)
    assert victim.exists()


# Ends with 70 at an import as another user: the audit event precedes the search for a module that is not loaded.
PROGRAM = """
import os, sys
import freegpt_auth.cli as cli
user = os.geteuid()
sys.addaudithook(lambda event, _: event == "import" and os.geteuid() != user and os._exit(70))
assert "lib" in cli.__file__
sys.exit(cli.main())
"""


def test_modules_that_only_root_may_read(home: Path, tmp_path: Path) -> None:
    """Everything is imported before the change of user: the owner of the folder may not reach root's packages."""
    package = Path(freegpt_auth.__file__).parent
    shutil.copytree(package, tmp_path / "lib" / package.name, ignore=shutil.ignore_patterns("__pycache__"))

    def done(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"PYTHONPATH": str(tmp_path / "lib")}  # and none of coverage's: it would count the copy
        command = [sys.executable, "-c", PROGRAM, *arguments]
        return subprocess.run(command, cwd=home, env=environment, check=False, capture_output=True, text=True)

    home.chmod(0o1755)  # filelock looks closer at a sticky folder
    assert done("--store=t.json", "create", "ci").returncode == 0
    (home / "t.json").write_text((home / "t.json").read_text().replace('"ci"', r'"\u202e"'))  # to be escaped
    for arguments in (
        ("--store=t.json", "list"),
        ("copy", "t.json", "new.json"),
        ("--store=new.json", "delete", "\u202e"),
    ):
        assert (done(*arguments).returncode, {each.stat().st_uid for each in home.iterdir()}) == (0, {OWNER})
    # An advice to install the driver would be wrong.
    assert "does not answer" in done("copy", "postgresql://127.0.0.1:1/tokens", "new.json").stderr
