import ast
import importlib.metadata
import itertools
import json
import re

import pytest

from dqtrain.data import docstrings
from dqtrain.data.docstrings import DOCSTRINGS, PACKAGES, docstring_pairs, docstrings_summary
from dqtrain.errors import DataError


def test_there_is_enough_to_train_on_and_a_twentieth_to_test():
    num_pairs = {split: int(summary["pairs"]) for split, summary in docstrings_summary().items()}
    total = sum(num_pairs.values())
    assert num_pairs["train"] >= 15_000
    assert all(0.04 < num_pairs[split] / total < 0.07 for split in ("validation", "test"))
    assert json.loads(json.dumps(docstrings_summary())) == docstrings_summary()


def test_nothing_leaks_between_splits():
    packages = [package.lower() for split in PACKAGES.values() for package in split]
    assert len(set(packages)) == len(packages)
    bodies, sentences = [], []
    for pairs in docstring_pairs().values():
        bodies.append({"\n".join(map(ast.unparse, ast.parse(source).body[0].body)) for source, _ in pairs})
        sentences.append({re.sub("[^a-z0-9_]", "", target.lower()) for _, target in pairs})
        assert len(sentences[-1]) == len(pairs)
    assert all(not (a & b) for texts in (bodies, sentences) for a, b in itertools.combinations(texts, 2))


def test_sources_are_functions_without_docstring_and_targets_sentences():
    for source, target in docstring_pairs()["validation"] + docstring_pairs()["test"]:
        (function,) = ast.parse(source).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) is None or target not in source
        assert source.startswith("# ") and 3 <= len(source.splitlines()) - 1 <= 60
        assert target.isascii() and target.isprintable() and target[0].isupper() and target[-1] == "."
        assert 3 <= len(target.split()) <= 20


def described_functions(package: str) -> dict[tuple[str, str], list[str]]:
    """(name of the function, first line of its docstring) -> such functions as ast writes them, without both, by parsing whole files."""
    found: dict[tuple[str, str], list[str]] = {}
    for file in importlib.metadata.distribution(package).files or []:
        if file.suffix != ".py" or ".." in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
                first, _, more = text.partition("\n")
                if re.fullmatch(r"[A-Z][ -~]*\. *", first) and 3 <= len(first.split()) <= 20 and not more.partition("\n")[0].strip() and len(node.body) > 1:
                    node.body, node.decorator_list = node.body[1:], []
                    found.setdefault((node.name, first.strip()), []).append(ast.unparse(node))
    return found


@pytest.mark.parametrize("package", ["absl-py", "click", "packaging", "tqdm"])
def test_what_is_mined_is_what_a_parser_of_whole_files_finds(package):
    expected = described_functions(package)
    found = [(ast.parse(source).body[0], target) for source, _, target in docstrings._functions(package)]
    assert found
    assert all(ast.unparse(function) in expected[function.name, target] for function, target in found)
    lengths_fit = [text for texts in expected.values() for text in texts if 6 <= text.count("\n") + 1 <= 40]
    assert len(found) > 0.9 * len(lengths_fit)


def test_comments_and_long_strings_neither_end_nor_swallow_a_function():
    text = '''
class A:
    @property
    def first(
        self, x: int
    ) -> int:
        """Return the first of them.

        More of it.
        """
# a comment at the margin
        y = x + 1
        return y

    def none(self):
        return 1

    def second(self):
        \'\'\'Return a long text.\'\'\'
        text = """
at the margin
"""
        return text

    def third(self): """Return it at once."""; return 3

    # about the next one
    async def fourth(self):
        r"""
        Wait for the fourth one.
        """
        # a reason

        return await self.x

    def fifth(self):
        """Return what goes on in
        another line."""
        x = 1
        return x
'''
    first = "# first\ndef first(\n    self, x: int\n) -> int:\n# a comment at the margin\n    y = x + 1\n    return y"
    fourth = "# fourth\nasync def fourth(self):\n    # a reason\n\n    return await self.x"
    assert [(source, target) for source, _, target in docstrings._functions_in(text)] == [
        (first, "Return the first of them."),
        (fourth, "Wait for the fourth one."),
    ]


def test_a_package_that_is_missing_is_named():
    with pytest.raises(DataError, match=f"{DOCSTRINGS} needs the package no-such-package, which pip has not installed; pip install"):
        list(docstrings._functions("no-such-package"))
