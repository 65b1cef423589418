"""What parafit keeps on disk: compiled programs above all. Its owner's alone, bounded, whole, and made anew where it is damaged."""

import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import pytest

from parafit.calibration import history
from parafit.support import files, processor, programs
from parafit.support.files import prune, write_whole
from parafit.support.programs import Programs

needs_modes = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX permissions")

SCRIPT = "import parafit, jax; print(jax.jit(lambda x: x + 1)(1.0))"


def start(tmp_path, script=SCRIPT, **environment):
    """A process that compiles a small program: what it printed, and what it complained about."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    return done.stdout.strip(), done.stderr


def kept(tmp_path):
    return sorted((tmp_path / "parafit").rglob("*.program"))


@needs_modes
def test_programs_are_their_owners_alone_and_for_one_processor_and_jaxlib(tmp_path):
    start(tmp_path)
    (folder,) = {path.parent for path in kept(tmp_path)}
    assert folder.name == f"jaxlib-{jax.lib.__version__}-{processor.processor_kind()}"
    for path in (folder, folder.parent, folder.parent.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept(tmp_path)} == {0o600}


def test_a_damaged_program_is_compiled_anew_with_a_line(tmp_path):
    start(tmp_path)
    whole = {path: path.read_bytes() for path in kept(tmp_path)}
    assert whole
    for path, content in whole.items():
        path.write_bytes(content[: len(content) // 2])
    said, complaints = start(tmp_path)
    assert said == "2.0"
    lines = complaints.splitlines()
    assert len(lines) == len(whole)
    assert all(line.startswith("parafit: a compiled program on disk was damaged and is compiled anew: ") for line in lines)
    assert start(tmp_path) == ("2.0", "")
    assert kept(tmp_path) == sorted(whole)


@pytest.mark.parametrize("damage", [lambda content: content[:-1] + b"?", lambda content: b"", lambda content: b"\0" * len(content)])
def test_every_damage_is_seen(tmp_path, caplog, damage):
    store = Programs(tmp_path)
    store.put("jit_f-123", b"machine code")
    assert store.get("jit_f-123") == b"machine code"
    (path,) = tmp_path.glob("*.program")
    path.write_bytes(damage(path.read_bytes()))
    assert store.get("jit_f-123") is None
    assert "was damaged and is compiled anew" in caplog.text
    caplog.clear()
    assert store.get("jit_f-123") is None
    assert not caplog.records
    store.put("jit_f-123", b"machine code")
    assert store.get("jit_f-123") == b"machine code"


def test_a_folder_that_the_user_chose_is_left_to_jax(tmp_path):
    chosen = tmp_path / "chosen"
    start(tmp_path, JAX_COMPILATION_CACHE_DIR=str(chosen), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert not kept(tmp_path)
    assert list(chosen.glob("*-cache"))
    later = f"import parafit, jax; jax.config.update('jax_compilation_cache_dir', {str(chosen)!r}); jax.jit(lambda x: x - 1)(1.0)"
    before = len(list(chosen.iterdir()))
    start(tmp_path, later)
    assert not kept(tmp_path)
    assert len(list(chosen.iterdir())) > before


def test_jax_imported_first_keeps_its_programs_too(tmp_path):
    start(tmp_path, "import jax, parafit; jax.jit(lambda x: x + 1)(1.0)")
    assert kept(tmp_path)


def test_a_process_leaves_nothing_in_the_environment_of_another(tmp_path):
    """A folder for this processor, handed on to another host, would be the wrong one."""
    script = "import os, parafit, jax; print([name for name in os.environ if name.startswith('JAX_') and 'CACHE' in name])"
    assert start(tmp_path, script)[0] == "[]"


def test_a_folder_that_cannot_be_made_costs_a_line(tmp_path):
    (tmp_path / "parafit").write_text("in the way")
    said, complaints = start(tmp_path)
    assert said == "2.0"
    (line,) = complaints.splitlines()
    assert line.startswith("parafit: compiled programs are not kept for the next start: ")


@needs_modes
def test_a_folder_of_another_user_is_not_trusted(tmp_path, monkeypatch):
    files.private_folder(tmp_path, "programs")
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="belongs to another user"):
        files.private_folder(tmp_path, "programs")


@needs_modes
def test_a_folder_that_others_could_enter_is_closed(tmp_path):
    folder = tmp_path / "programs"
    folder.mkdir(mode=0o755)
    files.private_folder(tmp_path, "programs")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_programs_not_used_for_longest_go_first(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "MOST_BYTES", 10_000)
    files.private_folder(tmp_path, "here")
    files.private_folder(tmp_path, "another jaxlib")
    other = tmp_path / "another jaxlib" / "old-cache"
    other.write_bytes(bytes(1500))
    store = Programs(tmp_path / "here")
    for number in range(4):
        store.put(f"p{number}", bytes(2000))
    for age, path in enumerate((*map(store._file, ("p1", "p0", "p3", "p2")), other)):
        os.utime(path, (time.time() - 100 * age,) * 2)
    assert store.get("p2") is not None, "using it makes it young"
    store.put("p4", bytes(2000))
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"p1.program", "p2.program", "p4.program"}
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 10_000


def test_a_part_that_a_killed_process_left_goes(tmp_path):
    for name, age in ((".a.1.1.part", 7200), (".b.1.1.part", 10)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    prune(tmp_path, 1 << 20)
    assert [path.name for path in tmp_path.iterdir()] == [".b.1.1.part"]


def test_many_may_write_and_read_the_same_program(tmp_path, caplog):
    program = bytes(range(256)) * 400
    with ThreadPoolExecutor(8) as pool:
        stores = [Programs(tmp_path) for _ in range(8)]
        list(pool.map(lambda turn: stores[turn % 8].put("same", program), range(200)))
        done = [
            pool.submit(stores[turn % 8].put if turn % 2 else stores[0].get, *(("same", program) if turn % 2 else ("same",)))
            for turn in range(400)
        ]
        assert all(each.result() == program for each in done[::2])
    assert [path.name for path in tmp_path.iterdir()] == ["same.program"]
    assert not caplog.records


def test_without_the_seam_jax_keeps_its_own_files(monkeypatch):
    from jax._src import compilation_cache

    monkeypatch.delattr(compilation_cache, "get_file_cache")
    programs._serve("folder", lambda: pytest.fail("nobody asks"))
    assert not hasattr(compilation_cache, "get_file_cache")


X86 = "processor : 0\nvendor_id : AuthenticAMD\ncpu family : 25\nmodel : 17\ncpu MHz : {}\nflags : fpu avx2{}\n\nprocessor : 1\n"
ARM = "processor : 0\nBogoMIPS : {}\nFeatures : fp asimd{}\nCPU implementer : 0x41\nCPU part : 0xd0c\n\n"


@pytest.mark.parametrize("text", [X86, ARM])
def test_processors_of_other_instructions_are_of_another_kind(monkeypatch, tmp_path, text):
    information = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "_INFORMATION", information)

    def kind(*words):
        information.write_text(text.format(*words))
        return processor.processor_kind()

    assert kind("2400.1", "") == kind("3100.7", "")
    assert kind("2400.1", "") != kind("2400.1", " sve avx512f")


def test_where_instructions_are_not_told_each_host_is_a_kind(monkeypatch, tmp_path):
    monkeypatch.setattr(processor, "_INFORMATION", tmp_path / "none")
    monkeypatch.setattr("platform.node", lambda: "here")
    here = processor.processor_kind()
    monkeypatch.setattr("platform.node", lambda: "there")
    assert processor.processor_kind() != here


def test_a_file_is_whole_or_what_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "before")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "after")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "before"


@needs_modes
def test_residuals_of_fits_that_end_at_once_are_all_kept(tmp_path, monkeypatch):
    fit = history.Residual(
        machine="m",
        model="net",
        batch=32,
        plan="single",
        predicted_seconds=1.0,
        measured_seconds=1.2,
        predicted_bytes=1,
        measured_bytes=1,
        date="2026",
    )
    monkeypatch.setattr(history, "MOST_BYTES", 150 * 180)
    one, many = tmp_path / "one" / "residuals.jsonl", tmp_path / "many" / "residuals.jsonl"
    turns = [replace(fit, model=f"net{turn:03}") for turn in range(240)]
    for turn in turns:
        history.append(turn, one)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda turn: history.append(turn, many), turns))
    assert len(history.load(many)) == len(history.load(one)) < 240
    assert stat.S_IMODE(many.stat().st_mode) == 0o600
    assert stat.S_IMODE(many.parent.stat().st_mode) == 0o700
