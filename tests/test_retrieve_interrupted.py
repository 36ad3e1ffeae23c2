"""Whatever ends a run of retrieve.py, the same command continues from there, and nothing is lost."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

import retrieve
from custom_diffusion.images import load_image
from custom_diffusion.retrieval import class_folder
from tests.conftest import ROOT
from tests.retrieval_images import drawing, encoded, jpeg
from tests.retrieval_web import (
    GOOD,
    check_mixture,
    command,
    lines,
    lists,
    run,
    serve_good,
    serve_mixture,
    serving,
    tree,
)


@pytest.fixture
def web():
    yield from serving()


@pytest.mark.long
def test_killed_ten_times_gives_what_an_uninterrupted_run_gives(web, tmp_path):
    serve_mixture(web)
    for number in range(GOOD):
        page = web.pages[f"/good/{number}.jpg"]
        web.pages[f"/good/{number}.jpg"] = lambda handler, page=page: (time.sleep(0.1), handler.answer(page))
    arguments = ["--class_prompt", "cat", "--url", web.url, "--num_class_images", 20, "--timeout", 1]
    arguments += ["--connections", 4]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert run(tmp_path / "whole", *arguments).returncode == 0
    moments = random.Random(1)
    folder = tmp_path / "killed/real_reg/samples_cat"
    counts = []
    for _ in range(10):
        process = subprocess.Popen(
            command(*arguments), cwd=tmp_path / "killed", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(0.3, 1.2))
        process.kill()
        process.wait()
        images = list((folder / "images").glob("*.jpg"))
        for image in images:
            load_image(image)
        counts.append(len(images))
    assert counts == sorted(counts) and counts[0] < 20
    result = run(tmp_path / "killed", *arguments)
    assert result.returncode == 0, result.stderr
    check_mixture(folder, 20)
    assert tree(folder) == tree(tmp_path / "whole/real_reg/samples_cat")


def killed_at(steps, folder, arguments):
    """Run retrieve.py, and kill it before the given step; runs in a process of its own."""
    left = steps

    def step():
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event, details):
        changes = event in ("os.rename", "os.remove") or (event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR))
        if changes and "cats" in str(details[0]):
            step()

    def before_line(record, journal_line=class_folder.journal_line):
        step()
        return journal_line(record)

    # Whatever is opened for writing, renamed or removed in the folder is a step, and so is each line of sources.jsonl.
    os.chdir(folder)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    sys.addaudithook(watch)
    class_folder.journal_line = before_line
    retrieve.main(arguments)


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.long)])
def test_killed_at_every_step_it_continues(tmp_path, monkeypatch, stride):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (tmp_path / "mine").mkdir()
    for row in range(2):
        (tmp_path / f"mine/{row}.jpg").write_bytes(jpeg(row))
        (tmp_path / f"mine/{row}.txt").write_text(f"cat number {row}")
    arguments = ["--class_prompt", "cat", "--path", "mine", "--num_class_images", "2", "--class_data_dir"]
    retrieve.main([*arguments, "whole"])
    whole = tree(tmp_path / "whole")
    # Forked from a server that has no threads and has imported everything: a start takes no time. It finds these tests
    # by this path, as it may begin here, in a folder that has none.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.test_retrieve_interrupted"])
    for steps in range(0, 100, stride):
        shutil.rmtree(tmp_path / "cats", ignore_errors=True)
        process = processes.Process(target=killed_at, args=[steps, tmp_path, [*arguments, "cats"]])
        process.start()
        process.join()
        present = sorted((tmp_path / "cats/images").glob("*.jpg"))
        assert [path.read_bytes() for path in present] == [jpeg(0), jpeg(1)][: len(present)]
        retrieve.main([*arguments, "cats"])
        found = {
            name: re.sub(rb"cats(?=[/\n])", b"whole", content) for name, content in tree(tmp_path / "cats").items()
        }
        assert found == whole, f"killed before step {steps}"
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert steps > 8 and process.exitcode == 0


@pytest.mark.parametrize("rest", [0, 1, 40, -1])
def test_a_line_that_was_cut_short_is_written_again(tmp_path, rest):
    (tmp_path / "mine").mkdir()
    for row in range(3):
        (tmp_path / f"mine/cat{row}.jpg").write_bytes(jpeg(row))
    arguments = ["--class_prompt", "cat", "--path", "mine", "--num_class_images", "3", "--class_data_dir", "cats"]
    assert run(tmp_path, *arguments).returncode == 0
    whole = tree(tmp_path / "cats")
    before, last, _ = whole["sources.jsonl"].rsplit(b"\n", 2)
    # What a run leaves that is killed while it writes the last line.
    (tmp_path / "cats/sources.jsonl").write_bytes(before + b"\n" + last[: rest if rest >= 0 else len(last)])
    (tmp_path / "cats/images/2.jpg").rename(tmp_path / "cats/images/.2.jpg.part")
    assert run(tmp_path, *arguments).returncode == 0
    assert tree(tmp_path / "cats") == whole


def test_interrupted_politely_it_leaves_lists_and_can_continue(web, tmp_path):
    serve_good(web, 40, seconds=0.15)
    arguments = ["--class_prompt", "cat", "--url", web.url, "--num_class_images", 40, "--connections", 2]
    process = subprocess.Popen(command(*arguments), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "real_reg/samples_cat"
    while len(list(folder.glob("images/*.jpg"))) < 5:
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and "Traceback" not in errors and "continues from there" in errors
    found = len(lists(folder)[0])
    assert 5 <= found < 40
    assert not list(folder.glob("images/.*"))
    asked = len([path for path in web.paths() if path.startswith("/good")])
    assert run(tmp_path, *arguments).returncode == 0
    assert len(lists(folder)[0]) == 40
    assert len([path for path in web.paths() if path.startswith("/good")]) - asked <= 40 - found


def test_two_runs_do_not_share_a_folder(web, tmp_path):
    serve_good(web, 3, seconds=2)
    arguments = ["--class_prompt", "cat", "--class_data_dir", "cats", "--num_class_images", 3, "--url", web.url]
    process = subprocess.Popen(command(*arguments), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while "/good/0.jpg" not in web.paths():
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.02)
    result = run(tmp_path, *arguments)
    assert result.returncode == 1 and "another run is filling 'cats'" in result.stderr
    assert process.wait(timeout=20) == 0
    assert len(lines(tmp_path / "cats/sources.jsonl")) == 3


def test_a_full_disk_is_one_clear_line_and_loses_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    (tmp_path / "mine").mkdir()
    for row in range(3):
        # The last one is the largest.
        (tmp_path / f"mine/cat{row}.jpg").write_bytes(encoded(drawing(row), quality=30 + 30 * row))
    limit = (tmp_path / "mine/cat2.jpg").stat().st_size - 1
    arguments = ["--class_prompt", "cat", "--path", "mine", "--num_class_images", "3", "--class_data_dir", "cats"]
    # A limit on the size of files stands for a full disk.
    result = subprocess.run(
        command(*arguments), cwd=tmp_path, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: 'cats' cannot be written to: ")
    assert len(lists(tmp_path / "cats")[0]) == 2
    assert run(tmp_path, *arguments).returncode == 0
    check = [load_image(tmp_path / image).size for image in lists(tmp_path / "cats")[2]]
    assert check == [(320, 300)] * 3
