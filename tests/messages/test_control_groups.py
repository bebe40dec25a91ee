"""Memory that control groups leave, of made folders and of a group of this machine."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rl_ebm.messages import memory
from rl_ebm.messages.control_groups import UNLIMITED, left_by_groups

GB = 10**9
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\nactive_file 7\n")


def told(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "cgroup"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("top", "names", "line", "none"),
    [
        (".", V2, "0::/job/step", "max"),
        ("memory", V1, "4:cpuset,memory:/job/step", "9223372036854771712"),
    ],
)
def test_the_least_that_any_group_above_leaves(tmp_path, top, names, line, none):
    root = tmp_path / "fs"
    said = told(tmp_path, "12:cpu,cpuacct:/elsewhere", line)
    top = root / top
    group(top / "elsewhere", names, "1", 0)  # not this process's
    group(top / "job" / "step", names, none, 3 * GB)
    assert left_by_groups(root, said) == UNLIMITED
    group(top / "job", names, f"{8 * GB}", 5 * GB, cache=GB)
    assert left_by_groups(root, said) == 4 * GB
    group(top / "job" / "step", names, f"{5 * GB}", 3 * GB)
    assert left_by_groups(root, said) == 2 * GB
    group(top, names, f"{6 * GB}", 5 * GB)
    assert left_by_groups(root, said) == GB
    group(top, names, f"{6 * GB}", 7 * GB)
    assert left_by_groups(root, said) == 0


@pytest.mark.parametrize("line", ["0::/docker/0123", "0::/../other", None])
def test_inside_a_container_the_root_is_its_own(tmp_path, line):
    """The path is of the machine, or of another's, or nothing is told at all."""
    group(tmp_path / "fs", V2, f"{2 * GB}", GB)
    group(tmp_path / "other", V2, "1", 0)
    said = tmp_path / "nothing" if line is None else told(tmp_path, line)
    assert left_by_groups(tmp_path / "fs", said) == GB


def test_a_group_whose_name_is_no_text(tmp_path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    group(tmp_path / "fs" / name, V2, f"{2 * GB}", GB)
    said = tmp_path / "cgroup"
    said.write_bytes(b"0::/caf\xe9\n")
    assert left_by_groups(tmp_path / "fs", said) == GB


def test_no_groups_set_no_limit(tmp_path):
    assert left_by_groups(tmp_path / "none", tmp_path / "nothing") == UNLIMITED


def test_what_groups_leave_is_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "left_by_groups", lambda: 12345)
    assert memory.free_bytes() == 12345


def test_a_real_group_with_a_limit(tmp_path):
    """A process in a group of this machine that leaves it 300 MB."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = {kind: path for _, kinds, path in lines for kind in (kinds.split(",") or [""])}
    top = Path("/sys/fs/cgroup") / ("memory" if "memory" in own else "")
    here = top / own.get("memory", own.get("", "/")).lstrip("/")
    name = "memory.limit_in_bytes" if "memory" in own else "memory.max"
    made = here / f"rl-ebm-test-{os.getpid()}"
    try:
        made.mkdir()
        (made / name).write_text("300000000")
    except OSError as error:
        if made.is_dir():
            made.rmdir()
        pytest.skip(f"no group with a limit can be made here: {error}")
    try:
        code = (
            "import os; from pathlib import Path; "
            f"Path({str(made / 'cgroup.procs')!r}).write_text(str(os.getpid())); "
            "from rl_ebm.messages.memory import free_bytes; print(free_bytes())"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert 0 < int(run.stdout) < 300_000_000
    finally:
        for _ in range(50):
            try:
                made.rmdir()
                break
            except OSError:  # the process is not gone yet
                time.sleep(0.05)
