"""Rows from a synthetic standard library."""

from pathlib import Path

import pytest

from draftwing.data.corpus import Row, Splits, chat_rows, in_held_out_module, read_stdlib

ADD = '''def add(a, b):
    """Add two numbers.

    The second paragraph is left out of the request.
    """
    total = a + b
    return total
'''


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def request(row: Row) -> str:
    return str(row["messages"][0]["content"])


def answer(row: Row) -> str:
    return str(row["messages"][1]["content"])


def texts(rows: list[Row]) -> list[str]:
    return [row["text"] for row in rows if "text" in row]


class TestChatRows:
    def test_docstring_becomes_the_request_and_source_the_answer(self) -> None:
        assert list(chat_rows(ADD)) == [
            {
                "messages": [
                    {"role": "user", "content": "Write the Python function add.\nAdd two numbers."},
                    {"role": "assistant", "content": "def add(a, b):\n    total = a + b\n    return total"},
                ]
            }
        ]

    def test_methods_are_dedented(self) -> None:
        source = 'class A:\n    def f(self):\n        """Say f."""\n        if self:\n            return 1\n'
        (row,) = chat_rows(source)
        assert answer(row) == "def f(self):\n    if self:\n        return 1"

    def test_async_functions_and_signatures_of_several_lines(self) -> None:
        source = 'async def f(\n    a,\n    b,\n):\n    """Say f."""\n    return a\n'
        (row,) = chat_rows(source)
        assert answer(row) == "async def f(\n    a,\n    b,\n):\n    return a"

    @pytest.mark.parametrize(
        "source",
        [
            "def f():\n    return 1\n",
            'def f():\n    """Only words."""\n',
            'def f(): """One line."""; return 1\n',
            'class A:\n    """Words."""\n    x = 1\n',
        ],
        ids=["no docstring", "no body", "one line", "no function"],
    )
    def test_nothing_to_ask_or_to_answer_gives_no_row(self, source: str) -> None:
        assert list(chat_rows(source)) == []

    def test_long_functions_are_left_out(self) -> None:
        def function(num_lines: int) -> str:
            return 'def f():\n    """Say f."""\n' + "    x = 1\n" * num_lines

        assert len(list(chat_rows(function(60)))) == 1
        assert list(chat_rows(function(61))) == []

    @pytest.mark.parametrize("source", ["def f(:\n", "print 'two'\n", "x = '\0'\n"])
    def test_syntax_errors_are_skipped(self, source: str) -> None:
        assert list(chat_rows(source)) == []

    @pytest.mark.parametrize("character", ["\f", "\x1c", "\u2028"])
    def test_only_line_breaks_count_as_such(self, character: str) -> None:
        """The standard library has form feeds between sections."""
        (row,) = chat_rows(f"# one{character}two\n{ADD}")
        assert answer(row) == "def add(a, b):\n    total = a + b\n    return total"

    def test_a_statement_on_the_docstrings_line_is_kept(self) -> None:
        rows = list(chat_rows('def f():\n    """Say f."""; x = 1\n    return x\n'))
        assert not rows or "x = 1" in answer(rows[0])

    def test_dedenting_leaves_strings_alone(self) -> None:
        source = 'class A:\n    def f(self):\n        """Say f."""\n        return """one\ntwo"""\n'
        rows = list(chat_rows(source))
        assert not rows or "one\ntwo" in answer(rows[0])


class TestReadStdlib:
    @pytest.fixture()
    def corpus(self, tmp_path: Path) -> Splits[Row]:
        files = {
            "maths.py": ADD,
            "broken.py": "def f(:\n",
            "package/inner.py": "# inner\n",
            "bisect.py": ADD.replace("add", "bisect_add"),
            "json/decoder.py": ADD.replace("add", "json_add"),
            "package/json.py": "# not the held-out json\n",
            "package/test/test_inner.py": "# a test\n",
            "site-packages/other.py": "# another licence\n",
            "_sysconfigdata_linux.py": "# generated\n",
            "notes.txt": "not Python",
        }
        return read_stdlib(write(tmp_path, files))

    def test_held_out_modules_and_packages_are_apart(self, corpus: Splits[Row]) -> None:
        assert texts(corpus.held_out) == [ADD.replace("add", "bisect_add"), ADD.replace("add", "json_add")]
        assert [request(row).split("\n")[0] for row in corpus.held_out if "messages" in row] == [
            "Write the Python function bisect_add.",
            "Write the Python function json_add.",
        ]

    def test_training_rows_are_the_rest_with_the_language_topics(self, corpus: Splits[Row]) -> None:
        train = texts(corpus.train)
        assert train[-4:] == ["def f(:\n", ADD, "# inner\n", "# not the held-out json\n"]
        assert len(train) > 4 + 50  # pydoc's topics come first
        assert [request(row).split("\n")[0] for row in corpus.train if "messages" in row] == [
            "Write the Python function add."
        ]

    def test_a_file_with_a_syntax_error_is_still_text(self, corpus: Splits[Row]) -> None:
        assert "def f(:\n" in texts(corpus.train)

    def test_tests_generated_files_and_other_packages_are_skipped(self, corpus: Splits[Row]) -> None:
        everything = texts(corpus.train) + texts(corpus.held_out)
        assert not {"# a test\n", "# another licence\n", "# generated\n", "not Python"} & set(everything)


@pytest.mark.parametrize(
    ("path", "expected"),
    [("json/decoder.py", True), ("csv.py", True), ("csvs.py", False), ("email/queue.py", False)],
)
def test_is_held_out(path: str, expected: bool) -> None:
    assert in_held_out_module(Path(path)) == expected
