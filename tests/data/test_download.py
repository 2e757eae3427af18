"""train/download_pile.sh and train/download_wudao.sh against a server of our own."""

import contextlib
import http.server
import io
import os
import random
import re
import shutil
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest

TRAIN = Path(__file__).resolve().parents[2] / "train"
# all that the scripts call but the program that unpacks
TOOLS = (
    "awk",
    "basename",
    "bash",
    "cat",
    "curl",
    "df",
    "dirname",
    "env",
    "mkdir",
    "mv",
    "rm",
    "sleep",
    "tar",
    "tr",
    "wc",
)
BODY = random.Random(0).randbytes(100_000)


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`. `log` holds (method, path, Range, bytes sent) of each request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.log = {}, []
        self.ranges = True
        self.cut = lambda start: None  # bytes after which a body that begins at `start` breaks off

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self, path):
        return [(wanted, sent) for method, name, wanted, sent in self.log if (method, name) == ("GET", path)]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        wanted, whole = self.headers["Range"], self.server.files.get(self.path)
        if whole is None:
            return self.send_error(404)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and self.server.ranges else 0
        rest = whole[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        sent = rest[: self.server.cut(start)] if body else b""
        self.server.log.append((self.command, self.path, wanted, len(sent)))
        with contextlib.suppress(ConnectionError):  # of a client that wanted another range
            self.wfile.write(sent)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        server.files = {f"/train/{i:02d}.jsonl.zst": BODY[i:] for i in range(30)}
        server.files |= {"/val.jsonl.zst": b"val", "/test.jsonl.zst": b"test", "/wudao.rar": archive()}
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def archive():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        info = tarfile.TarInfo("part-1.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"[]"))
    return file.getvalue()


@pytest.fixture
def bin(tmp_path):
    """The only folder on the scripts' PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(shutil.which(tool))
    return folder


@pytest.fixture
def run(server, bin, tmp_path):
    """Runs a script in `tmp_path`, where nothing goes through a proxy."""
    environment = {k: v for k, v in os.environ.items() if not k.lower().startswith("curl")}
    environment |= {
        "PATH": str(bin),
        "PILE_URL": server.url,
        "WUDAO_URL": f"{server.url}/wudao.rar",
        "DOWNLOAD_RETRIES": "1",
        "no_proxy": "127.0.0.1",
        "NO_PROXY": "127.0.0.1",
    }

    def run(script, *arguments, **variables):
        command = ["bash", TRAIN / f"download_{script}.sh", *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment | variables, capture_output=True, text=True, timeout=60
        )

    return run


def add_program(bin, name, text):
    (bin / name).unlink(missing_ok=True)
    (bin / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (bin / name).chmod(0o755)


# ---------------------------------------------------------------- the Pile


def test_all_files_arrive_and_complete_ones_are_not_fetched_again(run, server, tmp_path):
    done = run("pile")
    assert done.returncode == 0, done.stderr
    found = {
        f"/{path.relative_to(tmp_path / 'runs/pile')}": path.read_bytes()
        for path in (tmp_path / "runs/pile").rglob("*.*")
    }
    assert found == {name: body for name, body in server.files.items() if name != "/wudao.rar"}
    server.log.clear()
    again = run("pile")
    assert again.returncode == 0 and {method for method, *_ in server.log} == {"HEAD"}
    assert again.stdout.count(": complete (") == 32


def test_some_files_and_a_proxy_that_is_not_asked(run, tmp_path):
    done = run("pile", "some where", "08", "9", http_proxy="http://127.0.0.1:1")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "some where").rglob("*.*")}
    assert names == {"08.jsonl.zst", "09.jsonl.zst", "val.jsonl.zst", "test.jsonl.zst"}


def test_half_a_file_is_gone_on_from(run, server, tmp_path):
    (tmp_path / "p/train").mkdir(parents=True)
    (tmp_path / "p/train/00.jsonl.zst.part").write_bytes(BODY[:50_000])
    (tmp_path / "p/train/01.jsonl.zst.part").write_bytes(BODY[1:])  # stopped just before it was renamed
    done = run("pile", "p", 0, 1)
    assert done.returncode == 0 and "100000 bytes, 50000 of them here" in done.stdout, done.stderr
    assert server.gets("/train/00.jsonl.zst") == [("bytes=50000-", 50_000)]
    assert server.gets("/train/01.jsonl.zst") == []
    for i in (0, 1):
        assert (tmp_path / f"p/train/0{i}.jsonl.zst").read_bytes() == BODY[i:]
    assert not list((tmp_path / "p/train").glob("*.part"))


def test_a_connection_that_breaks_off_is_taken_up_again(run, server, tmp_path):
    server.cut = lambda start: 30_000
    done = run("pile", "p", 0, 0)
    assert done.returncode == 0 and (tmp_path / "p/train/00.jsonl.zst").read_bytes() == BODY
    asked = [wanted for wanted, _ in server.gets("/train/00.jsonl.zst")]
    assert asked == [None, "bytes=30000-", "bytes=60000-", "bytes=90000-"]


def test_a_file_cut_short_is_an_error_and_its_part_stays(run, server, tmp_path):
    server.cut = lambda start: 0 if start else 30_000
    done = run("pile", "p", 0, 0)
    assert done.returncode == 1
    assert "error: p/train/00.jsonl.zst: got 30000 bytes, expected 100000; what came is in" in done.stderr
    assert [path.name for path in (tmp_path / "p/train").iterdir()] == ["00.jsonl.zst.part"]
    assert (tmp_path / "p/train/00.jsonl.zst.part").read_bytes() == BODY[:30_000]
    assert len(server.gets("/train/00.jsonl.zst")) == 3  # and not again and again


def test_a_server_without_ranges_starts_the_file_anew(run, server, tmp_path):
    server.ranges = False
    (tmp_path / "p/train").mkdir(parents=True)
    (tmp_path / "p/train/00.jsonl.zst.part").write_bytes(b"x" * 50_000)
    done = run("pile", "p", 0, 0)
    assert done.returncode == 0 and "starting anew" in done.stderr, done.stderr
    assert (tmp_path / "p/train/00.jsonl.zst").read_bytes() == BODY
    server.cut, server.ranges = (
        (lambda start: 30_000),
        False,
    )  # each attempt loses the one before: it must end
    done = run("pile", "p", 1, 1)
    assert done.returncode == 1 and "01.jsonl.zst: got " in done.stderr


def test_files_of_another_size_are_errors(run, server, tmp_path):
    (tmp_path / "p/train").mkdir(parents=True)
    (tmp_path / "p/train/00.jsonl.zst").write_bytes(b"mine")
    done = run("pile", "p", 0, 0)
    assert done.returncode == 1 and "00.jsonl.zst: got 4 bytes, expected 100000" in done.stderr
    assert (tmp_path / "p/train/00.jsonl.zst").read_bytes() == b"mine" and not server.gets(
        "/train/00.jsonl.zst"
    )
    (tmp_path / "p/train/01.jsonl.zst.part").write_bytes(BODY * 2)
    done = run("pile", "p", 1, 1)
    assert done.returncode == 1 and "01.jsonl.zst: got 200000 bytes, expected 99999" in done.stderr
    assert "remove it to start anew" in done.stderr


def test_a_full_disk_is_seen_before_a_file_starts(run, server, bin, tmp_path):
    add_program(bin, "df", 'printf "Filesystem Blocks Used Available\\ndisk 9 9 97\\n"')
    done = run("pile", "p", 0, 0)
    assert done.returncode == 1 and "takes 100000 more bytes, got 99328 free on the disk" in done.stderr
    assert not server.gets("/train/00.jsonl.zst")
    (tmp_path / "p/train/00.jsonl.zst.part").write_bytes(BODY[:1000])  # the rest fits
    assert run("pile", "p", 0, 0).returncode == 0


def test_what_the_server_lacks_or_does_not_say(run, server):
    del server.files["/train/00.jsonl.zst"]
    done = run("pile", "p", 0, 0)
    assert (
        done.returncode == 1
        and f"{server.url}/train/00.jsonl.zst: the server does not give it" in done.stderr
    )
    server.files["/train/00.jsonl.zst"] = b""
    done = run("pile", "p", 0, 0)
    assert done.returncode == 1 and "names no Content-Length" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["p", "0"], "got 2 arguments, takes [FOLDER] [FIRST LAST]"),
        (["p", "0", "30"], "FIRST LAST: got 30, takes 0 to 29"),
        (["p", "-1", "3"], "FIRST LAST: got -1, takes 0 to 29"),
        (["p", "4", "3"], "FIRST LAST: got 4 3, takes them in order"),
    ],
)
def test_arguments(run, server, arguments, error):
    done = run("pile", *arguments)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {error}") and not server.log


def test_without_curl(run, bin):
    (bin / "curl").unlink()
    done = run("pile")
    assert done.returncode == 1 and done.stderr.startswith("error: curl is not installed; install it")


# ---------------------------------------------------------------- WuDao

UNPACKERS = {  # each on its own arguments, with a tar for a RAR
    "unrar": '[[ "$1 $2 $3" == "x -y -idq" ]] && tar -xf "$4" -C "$5"',
    "7z": '[[ "$1 $2" == "x -y" ]] && tar -xf "$4" -C "${3#-o}"',
    "bsdtar": '[[ "$1 $3" == "-xf -C" ]] && tar -xf "$2" -C "$4"',
}


@pytest.mark.parametrize("unpacker", UNPACKERS)
def test_wudao_is_unpacked_once(run, server, bin, tmp_path, unpacker):
    add_program(bin, unpacker, UNPACKERS[unpacker])
    (tmp_path / "w w/text.part").mkdir(parents=True)
    (tmp_path / "w w/text.part/left.json").touch()  # by a run that was stopped
    done = run("wudao", "w w")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "w w/text").iterdir()] == ["part-1.json"]
    assert sorted(path.name for path in (tmp_path / "w w").iterdir()) == [
        "WuDaoCorporaText-2.0-open.rar",
        "text",
    ]
    server.log.clear()
    again = run("wudao", "w w")
    assert again.returncode == 0 and "w w/text: complete" in again.stdout and not server.log


def test_an_archive_that_does_not_unpack(run, server, bin, tmp_path):
    server.files["/wudao.rar"] = b"no archive"
    add_program(bin, "unrar", UNPACKERS["unrar"])
    done = run("wudao", "w")
    assert done.returncode == 1 and "WuDaoCorporaText-2.0-open.rar: unrar could not unpack it" in done.stderr
    assert not (tmp_path / "w/text").exists()


def test_a_missing_unpacker_is_named_before_the_download(run, server):
    done = run("wudao", "w")
    assert (
        done.returncode == 1 and "no program that unpacks RAR is installed; install unrar, 7z" in done.stderr
    )
    assert not server.log
