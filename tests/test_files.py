"""Files that are whole or not at all, records that know when they are damaged, and output that ends no program."""

import errno
import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from vca_engine.files import (
    checksum_of,
    content_of,
    folder_written_aside,
    hold,
    remove_temporary,
    write_text,
    written_aside,
)
from vca_engine.records import read_json, read_lines, write_json
from vca_engine.terminal import SteadyStream, steady_output

RECORD = {"step": 3, "loss": 0.1 + 0.2, "none": None, "list": [1, (2, 3)], 7: "é", "nested": {"b": float("inf")}}


def test_a_file_written_aside_is_whole_and_readable_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "new" / "a", "text")
        with folder_written_aside(tmp_path / "folder") as made:
            (made / "x.safetensors").touch(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "a").read_text() == "text"
    assert os.listdir(tmp_path / "new") == ["a"]
    assert {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "new/a", tmp_path / "folder/x.safetensors")} == {0o640}


def test_two_that_write_one_file_do_not_meet(tmp_path):
    with written_aside(tmp_path / "a") as one, written_aside(tmp_path / "a") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one"  # the block that ended last
    assert os.listdir(tmp_path) == ["a"]


def test_a_name_as_long_as_the_file_system_takes(tmp_path):
    write_text(tmp_path / ("n" * 255), "text")
    with pytest.raises(OSError, match="cannot write .*: File name too long"):
        write_text(tmp_path / ("n" * 256), "text")


def test_what_a_killed_program_has_left_is_removed_and_nothing_else(tmp_path):
    for name in (".a[1].png.0123abcd.tmp", ".a[1].png.partial", ".b.png.0123abcd.tmp", "c.tmp", ".hidden", "d.partial"):
        (tmp_path / name).touch()
    (tmp_path / ".e.0123abcd.tmp").mkdir()
    remove_temporary(tmp_path, tmp_path / "a[1].png")
    assert sorted(os.listdir(tmp_path)) == [".b.png.0123abcd.tmp", ".e.0123abcd.tmp", ".hidden", "c.tmp", "d.partial"]
    remove_temporary(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "c.tmp", "d.partial"]


def test_a_lock_is_for_one(tmp_path):
    with hold(tmp_path / "new" / ".lock", "busy"), pytest.raises(ValueError, match="^busy$"):
        hold(tmp_path / "new" / ".lock", "busy")
    hold(tmp_path / "new" / ".lock", "busy").release()


def test_xxh3_of_known_bytes():
    assert checksum_of(b"") == "xxh3:2d06800538d394c2"  # XXH3_64bits("", seed 0), as xxHash's own tests give it


def test_a_record_is_read_as_it_was_written(tmp_path):
    write_json(tmp_path / "r.json", RECORD)
    assert read_json(tmp_path / "r.json") == json.loads(json.dumps(RECORD))


def test_any_flipped_bit_of_a_record_is_found_or_changes_nothing(tmp_path):
    file = tmp_path / "r.json"
    write_json(file, RECORD)
    good, expected, found = file.read_bytes(), read_json(file), 0
    for k in range(8 * len(good)):
        bad = bytearray(good)
        bad[k // 8] ^= 1 << k % 8
        file.write_bytes(bad)
        try:
            content = read_json(file)
        except ValueError as error:
            assert str(file) in str(error)
            found += 1
        else:
            content.pop("checksum", None)
            assert {
                k: v for k, v in content.items() if k in expected
            } == expected  # white space, or the checksum's name
    assert found > 0.8 * 8 * len(good)


def test_a_record_without_a_checksum_is_read(tmp_path):
    for text in ('{"a": 1}', '{"a": 1, "checksum": "of something else"}'):
        (tmp_path / "r.json").write_text(text)
        assert read_json(tmp_path / "r.json")["a"] == 1


@pytest.mark.parametrize("content", [b"", b"[1]", b"null", b"[" * 100_000, b'{"a"', b"\xff\xfe", b"\0" * 10])
def test_what_is_no_record_is_a_sentence(content, tmp_path):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(ValueError, match="r.json' is damaged: "):
        read_json(tmp_path / "r.json")


def test_a_log_keeps_the_lines_that_can_be_read(tmp_path):
    lines = [b'{"step": 1}', b"null", b"3", b"[1]", b'{"step": 2', b"\xff", b"[" * 100_000, b'{"step": 3}', b'{"st']
    (tmp_path / "log").write_bytes(b"\n".join(lines))
    assert read_lines(tmp_path / "log") == [{"step": 1}, {"step": 3}]
    assert read_lines(tmp_path / "none") == []


def test_names_cannot_steer_the_terminal():
    stream = SteadyStream(io.StringIO())
    print("cat\x1b]0;title\x07\x1b[2J\x9bA \u202egnp.\u2028\ttab é 猫 \x1b[1mbold\x1b[A", file=stream)
    assert stream.getvalue() == ("cat\\x1b]0;title\\x07\\x1b[2J\\x9bA \\u202egnp.\\u2028\ttab é 猫 \x1b[1mbold\x1b[A\n")


PRINTS = (
    "from vca_engine.terminal import steady_output\nwith steady_output():\n    for _ in range(9000): print('é' * 9)"
)


@pytest.mark.parametrize("where", ["a closed pipe", "a full disk", "an ASCII terminal", "nowhere"])
def test_output_that_cannot_be_written_ends_no_program(where):
    command = [sys.executable, "-c", f"{PRINTS}\nopen({'/dev/null'!r}, 'w').write('went on')"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii" if where == "an ASCII terminal" else "utf-8"}
    if where == "nowhere":
        command = ["sh", "-c", 'exec "$0" "$@" >&-', *command]
    with open("/dev/full" if where == "a full disk" else "/dev/null", "w") as file:
        pipe = where == "a closed pipe"
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE if pipe else file, stderr=subprocess.PIPE, env=environment
        )
        if pipe:
            process.stdout.close()
        error = process.stderr.read()
    assert (process.wait(), error) == (0, b"")


def test_afterwards_the_streams_are_as_before():
    before = sys.stdout
    with steady_output(), steady_output():
        assert sys.stdout is not before
    assert sys.stdout is before


def test_a_stream_that_was_closed_before_the_program_began_takes_a_progress_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with steady_output():
        assert sum(tqdm([1, 2])) == 3
    assert sys.stderr is None


def test_a_read_only_disk_is_named_by_the_file_that_was_meant(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "a name that nobody typed")

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match=rf"^cannot write '{tmp_path}/a': Read-only file system$"):
        write_text(tmp_path / "a", "text")


def test_what_never_ends_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="named pipe"):
        read_json(tmp_path / "pipe")
    with pytest.raises(OSError, match="larger than"):
        content_of("/dev/zero")
    reading, writing = os.pipe()  # as <(COMMAND) of a shell
    os.write(writing, b"seed: 3")
    os.close(writing)
    assert content_of(f"/dev/fd/{reading}") == b"seed: 3"
    os.close(reading)
