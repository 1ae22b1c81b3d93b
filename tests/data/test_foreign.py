"""Token files of Megatron-LM and datatrove, written by hand as their own writers lay them out."""

import struct

import numpy as np
import pytest
from conftest import prepare_one
from hypothesis import given, settings
from hypothesis import strategies as st

from dqtrain.config import Pairs
from dqtrain.data.folder import open_folder
from dqtrain.data.stream import DocumentStream, Stream
from dqtrain.errors import DataError

CODES = {np.uint16: 8, np.int32: 4}


def megatron(path, documents, dtype, damage=lambda index: index):
    """documents: list of lists of sequences."""
    sequences = [np.array(sequence, dtype) for document in documents for sequence in document]
    path.write_bytes(b"".join(sequence.tobytes() for sequence in sequences))
    lengths = [len(sequence) for sequence in sequences]
    pointers = [sum(lengths[:i]) * np.dtype(dtype).itemsize for i in range(len(lengths))]
    firsts = [sum(map(len, documents[:i])) for i in range(len(documents) + 1)]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(firsts))
    index += struct.pack(f"<{len(lengths)}i{len(pointers)}q{len(firsts)}q", *lengths, *pointers, *firsts)
    path.with_suffix(".idx").write_bytes(damage(index))
    return path


def datatrove(path, documents, letter, said=None):
    path.write_bytes(b"".join(struct.pack(f"<{len(document)}{letter}", *document) for document in documents))
    ends = np.cumsum([len(document) for document in documents]).tolist()
    path.with_name(path.name + ".index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    if said is not None:
        path.with_name(path.name + ".loss").write_bytes(struct.pack(f"<{len(said)}?", *said))
    return path


documents_of = st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=20), min_size=1, max_size=8)


@given(documents_of, st.sampled_from(["Megatron, uint16", "Megatron, int32", "datatrove, H", "datatrove, I"]), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_files_of_other_programs_are_read_in_place(tmp_path_factory, documents, kind, tokens_per_sample):
    root, name = tmp_path_factory.mktemp("foreign"), kind.split()[1]
    if kind.startswith("Megatron"):
        # each document as one or two sequences
        parts = [[document[:3], document[3:]] if len(document) > 3 else [document] for document in documents]
        path = megatron(root / "a.bin", parts, {"uint16": np.uint16, "int32": np.int32}[name])
    else:
        path = datatrove(root / "a.ds", documents, name)
    folder = open_folder(path, vocab_size=1000)
    tokens = [token for document in documents for token in document]
    stream = DocumentStream([folder], 30, 0, False)
    assert [stream.sample(i)[0].tolist() for i in range(stream.num_samples)] == [document[:-1] or document for document in documents]
    if len(tokens) > 1:
        packed = Stream([folder], tokens_per_sample, 0, False)
        labels = packed.batch(range(packed.num_samples)).labels
        assert labels[labels != -100].tolist() == tokens[1:]
        both = Stream([folder, open_folder(datatrove(root / "b.ds", documents, "H"), vocab_size=1000)], tokens_per_sample, 0, False)
        labels = both.batch(range(both.num_samples)).labels
        assert labels[labels != -100].tolist() == 2 * tokens[1:]


def test_what_datatrove_gives_no_loss_is_not_predicted(tmp_path):
    path = datatrove(tmp_path / "a.ds", [[1, 2, 3], [4, 5]], "H", [True, False, True, True, False])
    batch = Stream([open_folder(path, vocab_size=9)], 4, 0, False).batch(range(1))
    assert batch.input_ids.tolist() == [[1, 2, 3, 4]] and batch.labels.tolist() == [[-100, 3, 4, -100]]


def test_damaged_files_of_other_programs_are_refused(tmp_path):
    def refused(message, path, vocab_size=1000):
        with pytest.raises(DataError, match=message):
            Stream([open_folder(path, vocab_size=vocab_size)], 4, 0, False).batch(range(2))

    documents = [[[1, 2, 3], [4]], [[5, 6, 7, 8, 9]]]
    refused("token id 9 is not in .0, 9., the vocabulary; set data.tokenizer", megatron(tmp_path / "a.bin", documents, np.uint16), 9)
    refused("is not an index of Megatron-LM", megatron(tmp_path / "a.bin", documents, np.uint16, lambda index: b"x" + index))
    refused("has 60 bytes, but", megatron(tmp_path / "a.bin", documents, np.uint16, lambda index: index[:60]))
    refused(
        "its sequences do not follow each other",
        megatron(tmp_path / "a.bin", documents, np.uint16, lambda index: index[:34] + struct.pack("<i", 2) + index[38:]),
    )
    path = megatron(tmp_path / "a.bin", documents, np.uint16)
    path.write_bytes(path.read_bytes()[:-2])
    refused("holds 8 tokens, but its index says 9", path)
    path.with_suffix(".idx").unlink()
    refused(r"a.idx cannot be read \(No such file or directory\)", path)
    path = datatrove(tmp_path / "a.ds", [[1, 2, 3]], "H")
    path.write_bytes(path.read_bytes() + b"1")
    refused("a.ds.index says 3 tokens, but a.ds has 7 bytes, neither 2 nor 4", path)
    with pytest.raises(DataError, match="a.ds holds text, without sources and targets, but data.pairs asks for pairs"):
        prepare_one(str(path), "train", tmp_path, tmp_path, pairs=Pairs(source_tokens=8, target_tokens=8))
    path.unlink()
    refused("a.ds cannot be read", path)
