"""What a person sees of prepared data; and every way in which it can be damaged, from a real file to the message and exit code."""

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import prepare_one, write_corpus

from dqtrain.cli import main
from dqtrain.config import Pairs, Source
from dqtrain.data import sources
from dqtrain.data.prepare import load_tokenizer, read_index, train_tokenizer
from dqtrain.data.shard import Shard

CHATML = """{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """bpe/, and shards/ with a folder of text in many shards, one of chats and one of pairs."""
    root = tmp_path_factory.mktemp("show")
    write_corpus(root / "a.jsonl", 300, 1)
    train_tokenizer([Source(path=str(root / "a.jsonl"))], 290, root / "bpe")
    (root / "bpe/chat_template.jinja").write_text(CHATML)
    chats = [[{"role": "user", "content": f"cat {i}?"}, {"role": "assistant", "content": f"dog {i}."}] for i in range(5)]
    (root / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (root / "pairs.csv").write_text("source,target\ncat,dog\nhouse,tree\n")
    (root / "text").mkdir()
    for number in range(3):
        shutil.copy(root / "a.jsonl", root / f"text/{number}.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT_BYTES", 20_000)
        prepare_one(f"{root}/text/*.jsonl", "train", root / "bpe", root / "shards", workers=1)
    prepare_one(Source(path=str(root / "chats.jsonl"), messages="messages"), "validation", root / "bpe", root / "shards")
    prepare_one(str(root / "pairs.csv"), "test", root / "bpe", root / "shards", pairs=Pairs(source_tokens=8, target_tokens=8))
    return root


def folder(root: Path, split: str) -> Path:
    return next((root / "shards").glob(f"{split}-*"))


@pytest.fixture
def copy(made, tmp_path) -> Path:
    shutil.copytree(made / "shards", tmp_path / "shards")
    return tmp_path


def data(capfd, *arguments) -> tuple[int, str]:
    code = main(["data", *map(str, arguments)])
    output = capfd.readouterr()
    assert "Traceback" not in output.err and bool(output.err) == (code != 0)
    return code, output.out + output.err


def test_info_counts_what_is_there(made, capfd):
    code, text = data(capfd, "info", folder(made, "train"))
    index = read_index(folder(made, "train"))
    assert code == 0
    lines = {line.split()[0]: line.split(None, 1)[1] for line in text.splitlines()[1:] if " " in line.strip() and " in " not in line[:14]}
    assert lines["source"] == f"{made}/text/*.jsonl (3 files)" and lines["documents"] == "900" and lines["kind"] == "text"
    assert lines["tokens"].startswith(f"{index['num_tokens']:,} of 290 words") and lines["shards"].startswith(f"{len(index['shards'])} of ")
    hashes = "".join(Shard(folder(made, "train") / shard["file"]).checksum for shard in index["shards"])
    assert lines["shards"].endswith(f" bytes, sha256 {hashlib.sha256(hashes.encode()).hexdigest()}")
    assert lines["tokenizer"] == f"{made}/bpe, sha256 {index['tokenizer_hash']}"
    bars = [line.split() for line in text.splitlines() if re.match(r" +\d+ to ", line)]
    assert sum(int(bar[3]) for bar in bars) == 900 and [bar[0] for bar in bars] == ["8", "16", "32", "64"][: len(bars)]
    assert max(len(bar[4]) for bar in bars if len(bar) > 4) == 40
    code, text = data(capfd, "info", made / "shards")
    assert code == 0 and [line for line in text.splitlines() if not line.startswith(" ")] == sorted(
        str(folder(made, s)) for s in ("train", "validation", "test")
    )
    assert "2 pairs" in text and "tokens in sources:" in text and "kind       chat" in text


def test_info_of_a_config_has_weights(world, make_run, capfd, tmp_path):
    run = make_run()
    text = (
        run.config.read_text()
        .replace(
            f"train: {run.config.read_text().split('train: ')[1].split(',')[0]}",
            f"train: [{{path: {write_corpus(tmp_path / 'a.jsonl', 9, 1)}, weight: 3}}, {{path: {write_corpus(tmp_path / 'b.jsonl', 9, 2)}, weight: 0.5}}]",
            1,
        )
        .replace(f"shards: {world}/shards", f"shards: {tmp_path}/shards")
    )
    run.config.write_text(text)
    code, text = data(capfd, "info", run.config)
    assert code == 3 and "4 of 4 folders are not prepared, first " in text and f"Run dqtrain prepare {run.config}." in text
    assert main(["prepare", str(run.config), "--workers", "1"]) == 0
    assert len([line for line in capfd.readouterr().out.splitlines() if line.startswith("train: ")]) == 2
    for path in (run.config, run.path):
        code, text = data(capfd, "info", path)
        assert code == 0 and [line.split()[1] for line in text.splitlines() if line.startswith("  weight")] == ["3", "0.5", "in", "in"]


def test_show_has_documents_with_what_is_predicted(made, capfd):
    texts = [json.loads(line)["text"] for number in range(3) for line in (made / f"text/{number}.jsonl").read_text().splitlines()]
    end = "-" * 20 + " document ends " + "-" * 20
    for number in (0, 7, 899):
        code, text = data(capfd, "show", folder(made, "train"), "--sample", number)
        head, shown = text.split("\n", 1)
        assert code == 0 and head.startswith(f"sample {number} of {folder(made, 'train')}, tokens ")
        first = load_tokenizer(made / "bpe").decode(load_tokenizer(made / "bpe")(texts[number])["input_ids"][:1])
        assert shown == f"{first}«{texts[number].removeprefix(first)}<|endoftext|>»\n{end}\n\n"
    code, text = data(capfd, "show", folder(made, "validation"), "--sample", 3)
    assert code == 0 and text.split("\n", 1)[1] == f"<user>cat 3?<|endoftext|>\n<assistant>«dog 3.<|endoftext|>»\n\n{end}\n\n"
    code, text = data(capfd, "show", folder(made, "test"), "--sample", 1)
    assert code == 0 and text.split("\n", 1)[1] == f"house\n{end}\n«tree<|endoftext|>»\n{end}\n\n"


def test_show_has_packed_samples(made, capfd):
    texts = [json.loads(line)["text"] for line in (made / "text/0.jsonl").read_text().splitlines()]
    ids = load_tokenizer(made / "bpe")("<|endoftext|>".join(texts))["input_ids"]
    code, text = data(capfd, "show", folder(made, "train"), "--sample", 2, "--tokens-per-sample", 40)
    plain = text.split("\n", 1)[1].replace("\n" + "-" * 20 + " document ends " + "-" * 20 + "\n", "").replace("«", "").replace("»", "")
    assert code == 0 and plain == load_tokenizer(made / "bpe").decode(ids[80:121]) + "\n"
    assert ": 41 tokens, of which 40 are predicted" in text


def test_show_is_coloured_on_a_terminal(made):
    from dqtrain.data.show import show

    text = show(folder(made, "validation"), 0, coloured=True)
    assert "\x1b[2m<user>cat 0?<|endoftext|>\n<assistant>\x1b[0m\x1b[32mdog 0.<|endoftext|>\x1b[0m" in text


def test_what_cannot_be_shown_is_named(made, copy, capfd):
    for arguments, code, message in (
        ((folder(made, "train"), "--sample", 900), 3, "has 900 samples, counted from 0, but not number 900"),
        ((folder(made, "train"), "--sample", -1), 3, "has 900 samples, counted from 0, but not number -1"),
        ((folder(made, "test"), "--tokens-per-sample", 8), 3, "holds pairs, which are not packed"),
        ((made / "shards",), 2, "has 3 folders of samples. Name one of them"),
        ((made / "text",), 3, "holds no prepared data"),
    ):
        found, text = data(capfd, "show", *arguments)
        assert found == code and message in text
    shutil.copytree(made / "bpe", copy / "other")
    (copy / "other/tokenizer_config.json").write_text((copy / "other/tokenizer_config.json").read_text() + "\n")
    code, text = data(capfd, "show", folder(copy, "train"), "--tokenizer", copy / "other")
    assert code == 3 and f"tokenizer {copy}/other has the hash" in text and "Name its folder with --tokenizer" in text
    for part in ("x", "3/3", "-1/2", "1/0"):
        with pytest.raises(SystemExit) as end:
            main(["prepare", "x.yaml", f"--part={part}"])
        assert end.value.code == 2 and "K/N" in capfd.readouterr().err


def test_verify_reads_every_byte(made, capfd):
    code, text = data(capfd, "verify", made / "shards")
    shards = list((made / "shards").glob("*/*.bin"))
    assert code == 0 and text.startswith(f"{len(shards)} shards in 3 folders are as they were written: {sum(path.stat().st_size for path in shards):,} bytes")


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def test_verify_names_everything_that_is_damaged(copy, capfd):
    first, second, third, *_ = sorted(folder(copy, "train").glob("*.bin"))
    flip(first, first.stat().st_size // 2)
    second.write_bytes(second.read_bytes()[:-9])
    third.unlink()
    chat = next(folder(copy, "validation").glob("*.bin"))
    shutil.copy(next(folder(copy, "test").glob("*.bin")), chat)
    count = len(list(copy.glob("shards/*/*.bin"))) + 1
    code, text = data(capfd, "verify", copy / "shards")
    assert code == 3 and f"4 of {count} shards are damaged:" in text
    for line in (
        f"{first}: block 0 of 1 does not match its checksum",
        f"{second} has {second.stat().st_size} bytes, but its header says {second.stat().st_size + 9}",
        f"{third} is missing; run dqtrain prepare again",
        f"{chat} is not the one that the index names",
    ):
        assert line in text


@pytest.mark.parametrize("where", ["ends", "tokens", "mask", "checksum", "header"])
def test_a_flipped_bit_is_found_wherever_it_is(copy, capfd, where):
    path = next(folder(copy, "validation").glob("*.bin"))
    shard = Shard(path)
    size, mask = path.stat().st_size, -(-shard.num_tokens // 8)
    at = {"header": 40, "ends": size - 8 - mask - 2 * shard.num_tokens - 8, "tokens": size - 8 - mask - 5, "mask": size - 8 - 1, "checksum": size - 3}[where]
    del shard
    flip(path, at)
    code, text = data(capfd, "verify", copy / "shards")
    assert code == 3 and str(path) in text and ("the header does not match" if where == "header" else "block 0 of 1 does not match its checksum") in text


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not an index of shards"), ('{"version": 1}', "has format version 1, but this dqtrain reads 2; delete")]
)
def test_an_index_that_cannot_be_used_is_named(copy, capfd, content, message):
    (folder(copy, "train") / "index.json").write_text(content)
    code, text = data(capfd, "verify", copy / "shards")
    assert code == 3 and f"{folder(copy, 'train')}/index.json" in text and message in text


# --- Disks ---


def mounted(path: Path, *options: str) -> bool:
    path.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(path)], capture_output=True).returncode:
        assert not os.environ.get("CI"), "CI must be able to mount a tmpfs"
        return False
    return True


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_disk_that_is_full_or_may_not_be_written_keeps_what_is_complete(make_run, tmp_path, capfd, monkeypatch, workers):
    disk = tmp_path / "disk"
    if not mounted(disk, "-o", "size=300k"):
        pytest.skip("mounting a tmpfs needs root")
    try:
        monkeypatch.setattr(sources, "UNIT_BYTES", 50_000)
        corpus = write_corpus(tmp_path / "large.jsonl", 9000, 3)
        arguments = ["prepare", str(make_run().config), f"data.train={corpus}", f"data.shards={disk}", "--workers", workers]
        assert main(arguments) == 3
        message = capfd.readouterr().err
        assert "cannot be written (No space left on device); free space or choose another folder, then start again" in message
        kept = {path: path.stat().st_mtime_ns for path in disk.glob("train-*/shard-*.bin")}
        done = {path.name[5:10] for path in disk.glob("train-*/part-*")}
        assert done and not list(disk.glob("train-*/index.json"))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert main(arguments) == 3
        assert "cannot be written (Read-only file system)" in capfd.readouterr().err
        subprocess.run(["mount", "-o", "remount,rw,size=10m", str(disk)], check=True)
        assert main(arguments) == 0
        assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
        assert main(["data", "verify", str(disk)]) == 0
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_file_that_may_not_grow_leaves_no_torn_shard(made, tmp_path):
    """As on a full disk, and without root."""
    from dqtrain.errors import DataError

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(DataError, match=r"shard-00000-00000\.bin cannot be written \(File too large\)"):
            prepare_one(str(made / "a.jsonl"), "train", made / "bpe", tmp_path, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.glob("*/*")] == []
